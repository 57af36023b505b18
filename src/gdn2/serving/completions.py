"""/v1/completions: prompts as text or tokens, their continuations, and log-probabilities of both."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from gdn2.data import Tokenizer
from gdn2.inference import Event, TokenScore
from gdn2.serving.schema import CompletionRequest
from gdn2.serving.service import DEFAULT_NEW_TOKENS, Service
from gdn2.serving.streams import EventStream, unless_gone


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token's own text; one that is no whole character, or has none, is called by its id."""
    text = tokenizer.decode([token])
    return f"token_id:{token}" if not text or "\ufffd" in text else text


def named(tokenizer: Tokenizer, score: TokenScore, token: int) -> dict[str, float]:
    """The likeliest tokens' log-probabilities, and the chosen one's, by name; of equal names the likeliest counts."""
    names: dict[str, float] = {}
    for other, logprob in (*score.top.items(), (token, score.logprob)):
        names.setdefault(token_name(tokenizer, other), logprob)
    return names


async def complete(service: Service, body: CompletionRequest, receive: Receive) -> Response:
    """Answer a request, whole or as events."""
    service.check_model(body.model)
    prompt: Any = "" if body.prompt is None else body.prompt
    given = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    prompts = [await service.encode(one) if isinstance(one, str) else one for one in given]
    new_tokens, n = service.new_tokens(body.max_tokens, DEFAULT_NEW_TOKENS), body.n or 1
    told = body.logprobs if body.echo else None
    requests = service.requests(body, prompts, new_tokens, body.logprobs, told)
    choices = [_Choice(service.tokenizer, body, given[i // n], prompts[i // n]) for i in range(len(requests))]
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.settings.name,
    }
    job = service.submit(requests)

    def usage() -> dict[str, int]:
        read, said = sum(map(len, prompts)), sum(choice.new for choice in choices) if new_tokens else 0
        return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}

    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        wanted = body.stream_options is not None and body.stream_options.include_usage
        more = {"usage": None} if wanted else {}
        async for index, event in service.events(job):
            yield head | {"choices": [{"index": index} | choices[index].add(event, new_tokens > 0)]} | more
        if wanted:
            yield head | {"choices": [], "usage": usage()}

    async def whole() -> list[dict[str, Any]]:
        parts: list[list[dict[str, Any]]] = [[] for _ in choices]
        async for index, event in service.events(job):
            parts[index].append(choices[index].add(event, new_tokens > 0))
        return [{"index": index} | _joined(part) for index, part in enumerate(parts)]

    if body.stream:
        return EventStream(job, chunks())
    with job:
        found = await unless_gone(receive, whole())
    return JSONResponse(head | {"choices": found, "usage": usage()})


class _Choice:
    """One text as it grows, and what of it goes into the answer."""

    def __init__(
        self, tokenizer: Tokenizer, body: CompletionRequest, given: str | Sequence[int], prompt: Sequence[int]
    ) -> None:
        self.tokenizer, self.prompt, self.scored = tokenizer, prompt, body.logprobs is not None
        text = given if isinstance(given, str) else tokenizer.decode(given)
        self.echo = text if body.echo else None
        self.offset = 0  # characters before the next token, also of such as are held back for a stop string
        self.stream = tokenizer.stream()
        self.new = 0  # tokens so far

    def add(self, event: Event, shown: bool) -> dict[str, Any]:
        """The part of a choice that an event brings; `shown` is whether new tokens are part of the answer."""
        text, logprobs = "", _Logprobs()
        if self.echo is not None:  # with the first event
            text, self.echo = self.echo, None
            if self.scored:
                self._add_prompt(event.prompt_scores, logprobs)
            self.offset = len(text)
        if shown:
            self.new += event.token is not None
            text += event.text
            if self.scored and event.score is not None:
                token = self.tokenizer.end_of_text if event.token is None else event.token
                logprobs.add(self.tokenizer, token, event.score, self.offset)
                self.offset += len(self.stream.feed(token))
        finish = event.finish if shown or event.finish is None else "length"
        return {"text": text, "logprobs": vars(logprobs) if self.scored else None, "finish_reason": finish}

    def _add_prompt(self, scores: Sequence[TokenScore], logprobs: "_Logprobs") -> None:
        stream, offset = self.tokenizer.stream(), 0
        for token, score in zip(self.prompt, (None, *scores), strict=True):
            logprobs.add(self.tokenizer, token, score, offset)
            offset += len(stream.feed(token))


class _Logprobs:
    """Of tokens in a row, as the API has it."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.token_logprobs: list[float | None] = []
        self.top_logprobs: list[dict[str, float] | None] = []
        self.text_offset: list[int] = []

    def add(self, tokenizer: Tokenizer, token: int, score: TokenScore | None, offset: int) -> None:
        self.tokens.append(token_name(tokenizer, token))
        self.token_logprobs.append(None if score is None else score.logprob)
        self.top_logprobs.append(None if score is None else named(tokenizer, score, token))
        self.text_offset.append(offset)


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A whole choice from its parts."""
    logprobs = None
    if parts[0]["logprobs"] is not None:
        logprobs = {name: [x for part in parts for x in part["logprobs"][name]] for name in parts[0]["logprobs"]}
    text = "".join(part["text"] for part in parts)
    return {"text": text, "logprobs": logprobs, "finish_reason": parts[-1]["finish_reason"]}
