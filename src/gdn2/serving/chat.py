"""/v1/chat/completions: the same engine behind a chat template."""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from gdn2.data import Tokenizer
from gdn2.inference import Event
from gdn2.serving.completions import token_name
from gdn2.serving.errors import RequestError
from gdn2.serving.schema import ChatRequest
from gdn2.serving.service import Service
from gdn2.serving.streams import EventStream, unless_gone

DEFAULT_NEW_TOKENS = 1_024  # OpenAI sets none; a small model may never come to an end


async def chat(service: Service, body: ChatRequest, receive: Receive) -> Response:
    """Answer a request, whole or as events."""
    service.check_model(body.model)
    if service.template is None:
        message = "this model has no chat template; use /v1/completions, or serve it with --chat-template"
        raise RequestError(message, "messages", "no_chat_template")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs is given without logprobs; expected logprobs to be true", "top_logprobs")
    try:
        prompt = service.template.encode([(message.role, message.text) for message in body.messages])
    except ValueError as error:
        raise RequestError(str(error), "messages") from error
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if asked == 0:
        raise RequestError("max_tokens is 0; expected at least 1", "max_tokens")
    prompt = prompt or [service.tokenizer.end_of_text]
    top = (body.top_logprobs or 0) if body.logprobs else None
    requests = service.requests(body, [prompt], service.new_tokens(asked, DEFAULT_NEW_TOKENS), top)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.settings.name}
    said = [0] * len(requests)
    job = service.submit(requests)

    def usage() -> dict[str, int]:
        new = sum(said)
        return {"prompt_tokens": len(prompt), "completion_tokens": new, "total_tokens": len(prompt) + new}

    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        wanted = body.stream_options is not None and body.stream_options.include_usage
        first = head | {"object": "chat.completion.chunk"}
        more = {"usage": None} if wanted else {}
        for index in range(len(requests)):
            delta = {"role": "assistant", "content": ""}
            yield first | {"choices": [_chunk(index, delta, None, None)]} | more
        async for index, event in service.events(job):
            said[index] += event.token is not None
            logprobs = _logprobs(service.tokenizer, [event]) if body.logprobs else None
            yield first | {"choices": [_chunk(index, {"content": event.text}, logprobs, event.finish)]} | more
        if wanted:
            yield first | {"choices": [], "usage": usage()}

    async def whole() -> list[list[Event]]:
        heard: list[list[Event]] = [[] for _ in requests]
        async for index, event in service.events(job):
            said[index] += event.token is not None
            heard[index].append(event)
        return heard

    if body.stream:
        return EventStream(job, chunks())
    with job:
        heard = await unless_gone(receive, whole())
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(event.text for event in events)},
            "logprobs": _logprobs(service.tokenizer, events) if body.logprobs else None,
            "finish_reason": events[-1].finish,
        }
        for index, events in enumerate(heard)
    ]
    return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage()})


def _chunk(index: int, delta: dict[str, str], logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _logprobs(tokenizer: Tokenizer, events: list[Event]) -> dict[str, Any]:
    """The chosen tokens of the events with the likeliest ones."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        name = token_name(tokenizer, token)
        text = tokenizer.decode([token])
        return {"token": name, "logprob": logprob, "bytes": list(name.encode()) if name == text else None}

    return {
        "content": [
            entry(event.token, event.score.logprob)
            | {"top_logprobs": [entry(token, logprob) for token, logprob in event.score.top.items()]}
            for event in events
            if event.token is not None and event.score is not None
        ]
    }
