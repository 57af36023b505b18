"""/view: a text with what each of its tokens did to the model's memory, for the page at /."""

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import Response

from gdn2.data.tokenizer import TextStream
from gdn2.inference import MemoryTrace, Request, TokenTrace, traced_blocks
from gdn2.serving.errors import RequestError
from gdn2.serving.schema import WHOLE, Body, Text, TokenId
from gdn2.serving.service import Service
from gdn2.serving.streams import EventStream

MOST_TOKENS = 4_096  # of a text that is viewed
PIECE = 32  # tokens traced between two steps of the engine


class ViewRequest(Body):
    prompt: Text | Annotated[list[TokenId], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE] = 128
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: Annotated[int, Field(ge=0, lt=2**63), WHOLE] | None = None
    block: Annotated[int, Field(ge=0, lt=2**31), WHOLE] = 0
    head: Annotated[int, Field(ge=0, lt=2**31), WHOLE] = 0


def describe(service: Service) -> dict[str, Any]:
    """What the page needs to know of the model."""
    model = service.model
    blocks = traced_blocks(model)
    mixers: list[Any] = model.mixers()
    first = mixers[blocks[0]] if blocks else None
    attention = "attention" in model.config.layer_kinds
    return {
        "model": service.settings.name,
        "parameters": model.num_parameters(),
        "state_bytes": service.worker.state_bytes // service.worker.slots,
        "constant": not (attention and model.config.window is None),
        "blocks": blocks,
        "heads": first.num_value_heads if first else 0,
        "key_dim": first.key_dim if first else 0,
        "value_dim": first.value_dim if first else 0,
        "most_tokens": MOST_TOKENS,
        "needs_key": bool(service.settings.keys),
    }


async def view(service: Service, body: ViewRequest) -> Response:
    """Stream {"tokens": [...]} and last {"finish", "new_tokens", "seconds"}."""
    prompt = await service.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
    service.check_prompt(prompt)
    service.new_tokens(body.max_tokens, 1)
    if len(prompt) + body.max_tokens > MOST_TOKENS:
        message = f"{len(prompt)} tokens and {body.max_tokens} new ones; expected at most {MOST_TOKENS} together"
        raise RequestError(message, "max_tokens")
    trace = None
    if traced_blocks(service.model):
        try:
            trace = MemoryTrace(service.model, body.block, body.head)
        except ValueError as error:
            raise RequestError(str(error), "block") from error
    request = Request(prompt, body.max_tokens, body.temperature, top_p=body.top_p, seed=body.seed)
    job = service.submit([request])

    async def told(tokens: Sequence[int], texts: Sequence[str], read: bool) -> dict[str, Any]:
        traces = None if trace is None else await service.worker.call(lambda: trace.read(tokens))
        rows = [{}] * len(tokens) if traces is None else map(_numbers, traces)
        about = zip(tokens, texts, rows)
        return {"tokens": [{"id": token, "text": text, "prompt": read} | row for token, text, row in about]}

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        texts = list(_texts(service.tokenizer.stream(), prompt))
        for start in range(0, len(prompt), PIECE):
            part = slice(start, start + PIECE)
            yield await told(prompt[part], texts[part], True)
        started, new = time.perf_counter(), 0
        async for _, event in service.events(job):
            if event.token is not None:
                new += 1
                yield await told([event.token], [event.text], False)
            elif event.text:
                yield {"tokens": [], "text": event.text}
            if event.finish is not None:
                seconds = time.perf_counter() - started
                yield {"finish": event.finish, "new_tokens": new, "seconds": round(seconds, 3)}

    return EventStream(job, events())


def _texts(stream: TextStream, tokens: Sequence[int]) -> Iterator[str]:
    """What each token adds to the text; the last one also what is left unfinished."""
    for index, token in enumerate(tokens):
        yield stream.feed(token) + (stream.flush() if index == len(tokens) - 1 else "")


def _numbers(trace: TokenTrace) -> dict[str, Any]:
    """Three digits are plenty for a picture."""

    def rounded(values: Any) -> Any:
        return [rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.3g}")

    sizes = {name: rounded(getattr(trace, name).tolist()) for name in ("faded", "erased", "written")}
    return sizes | {"head": {name: rounded(part.tolist()) for name, part in trace.head._asdict().items()}}
