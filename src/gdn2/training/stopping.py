"""Ctrl-C and SIGTERM, as schedulers send it, made into something that a run can end well on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Stopped(BaseException):
    """What a signal raises within `StopSignals.raising`; no Exception, so that nobody takes it for a failure."""


class StopSignals:
    """A context in which the first SIGINT or SIGTERM is noted in `received`, by name; the next one acts as usual."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._raises = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A block that the signal ends at once by Stopped, also one that was there before: what writes nothing and may
        take long. `with suppress(Stopped), stop.raising()` goes on behind it, where `received` tells."""
        self._raises = True
        try:
            if self.received is not None:
                raise Stopped
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()
        if self._raises:
            raise Stopped

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
