"""Answers that end when their client does: server-sent events, and whole ones that are awaited."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gdn2.serving.errors import described, stopping
from gdn2.serving.worker import Job

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was there."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; `ClientGoneError`, with `work` cancelled and ended, when the client leaves before."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: each value as JSON, then `[DONE]`. An error on the way is the last value.

    The job that they come from is left with them, also where the client is gone before the first.
    """

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.job, self.events = job, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def say(data: str, more: bool = True) -> None:
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        with self.job:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await unless_gone(receive, self._tell(say))
            except ClientGoneError:
                return
            except asyncio.CancelledError:
                await say(json.dumps(stopping()[1]))
            await say("[DONE]", more=False)

    async def _tell(self, say: Callable[[str], Awaitable[None]]) -> None:
        async with aclosing(self.events) as events:
            try:
                async for event in events:
                    await say(json.dumps(event, ensure_ascii=False, separators=(",", ":")))
            except (TimeoutError, ValueError, RuntimeError) as error:
                await say(json.dumps(described(error)[1]))
