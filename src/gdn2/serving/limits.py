"""The gate before every route: API keys, rates, the size of bodies, and clients that stall."""

import asyncio
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gdn2.serving.errors import respond, stopping
from gdn2.serving.settings import ServerSettings

log = logging.getLogger("gdn2.serving")
OPEN_PATHS = ("/", "/health")  # without a key: the page holds no secret and asks for one
LIMITED = "POST"  # reading what the server is costs nothing
CLIENTS = 10_000  # whose rates are remembered


class RateLimit:
    """So many requests a minute for each client, all at once or spread; a bucket that fills steadily."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, and when that was so

    def wait(self, client: str) -> int:
        """Take one request of a client's; returns 0, or the whole seconds after which there is one to take."""
        now = self._clock()
        left, then = self._buckets.pop(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        allowed = left >= 1
        self._buckets[client] = (left - allowed, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return 0 if allowed else math.ceil((1 - left) * 60 / self.per_minute)


class Gate:
    """ASGI middleware that lets a request through to `app`, or answers it itself."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, rejected: Callable[[str], None]) -> None:
        self.app, self.settings, self.rejected = app, settings, rejected
        self._rate = RateLimit(settings.rate) if settings.rate else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        host = re.sub(r":\d*$", "", headers.get("host", ""))
        if self.settings.hosts and host.lower() not in self.settings.hosts:
            self.rejected("host")
            message = f"the host is {host[:100]!r}; expected {' or '.join(self.settings.hosts)}"
            return await respond(403, message, code="host_not_allowed")(scope, receive, send)
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if self.settings.keys and scope["path"] not in OPEN_PATHS and not self.settings.accepts(key):
            self.rejected("key")
            message = "a valid API key is needed, as 'Authorization: Bearer KEY'"
            answer = respond(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            return await answer(scope, receive, send)
        if self._rate is not None and scope["method"] == LIMITED:
            client = key if self.settings.keys else (scope.get("client") or ("",))[0]
            if seconds := self._rate.wait(client):
                self.rejected("rate")
                message = f"more than {self.settings.rate} requests a minute; try again in {seconds} s"
                answer = respond(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
                return await answer(scope, receive, send)
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, self._limited(receive), self._patient(noted))
        except StalledError:
            self.rejected("stalled")
            log.info("a client did not take its answer within %s s", self.settings.send_timeout)
            raise
        except asyncio.CancelledError:  # the server ends
            if begun:
                raise
            status, body = stopping()
            await JSONResponse(body, status)(scope, receive, send)
        return None

    def _limited(self, receive: Receive) -> Receive:
        """`receive` for a body of bounded size that arrives in bounded time."""
        size, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self.settings.body_timeout

        async def limited() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                while not whole:
                    async with asyncio.timeout_at(deadline):
                        message = await receive()
                    size += len(message.get("body", b""))
                    whole = not message.get("more_body", False)
                    if size <= self.settings.max_body:
                        return message
                    # Read on and forget: most clients hear an answer only once they have said everything.
            except TimeoutError:
                if size <= self.settings.max_body:
                    self.rejected("slow")
                    raise HTTPException(408, f"the body took longer than {self.settings.body_timeout:g} s") from None
            self.rejected("size")
            raise HTTPException(413, f"the body is too large; expected at most {self.settings.max_body:,} bytes")

        return limited

    def _patient(self, send: Send) -> Send:
        """`send` that gives up on a client which takes nothing."""

        async def patient(message: Message) -> None:
            try:
                async with asyncio.timeout(self.settings.send_timeout):
                    await send(message)
            except TimeoutError:
                raise StalledError from None

        return patient


class StalledError(Exception):
    """The client does not read."""
