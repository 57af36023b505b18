"""An application on a socket, until a signal ends it."""

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

KEEP_ALIVE = 30  # seconds that an idle connection is kept


class _Server(uvicorn.Server):
    """Tells when it accepts requests, and gives up those that run at a second signal, whichever it is."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own way takes no second SIGTERM, and leaves requests and the engine without an end.
        if self.should_exit:
            for task in list(self.server_state.tasks):
                task.cancel()
        else:
            super().handle_exit(sig, frame)


def make_server(app: ASGIApp, grace: int, connections: int, ready: Callable[[], None]) -> uvicorn.Server:
    """Plain HTTP/1.1.

    Args:
        grace: seconds that running requests get to finish after the first signal.
        connections: open ones at a time; more are answered with 503.
        ready: called once requests are accepted.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # an address that a client may name itself is none to limit it by
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=grace,
        limit_concurrency=connections,
    )
    return _Server(config, ready)


def serve(app: ASGIApp, host: str, port: int, grace: int, connections: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs; a second signal, or the end of `grace`, gives it up.

    Args:
        port: 0 takes a free one.
        ready: called with the address once requests are accepted.

    Raises:
        OSError: the address cannot be had.
    """
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    server = make_server(app, grace, connections, lambda: ready(address))
    # uvicorn raises the signals that it caught once more after its end; they have been heeded by then.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listening.close()
