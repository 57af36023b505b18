"""The engine in a thread of its own, and jobs that await its events on the server's event loop.

The loop puts commands into an inbox; the thread carries them out between two steps and hands the events of each step
back at once. Whoever leaves a job early, by a disconnect or a time-out, frees its slots: `Job` is a context manager.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, Self, TypeVar

from gdn2.inference import Engine, Event, Request

log = logging.getLogger("gdn2.serving")
Result = TypeVar("Result")
Command = Callable[[Engine], None]


class BusyError(Exception):
    """The queue is full; `retry_after` is in how many seconds it should have room again."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"all places are taken; try again in {retry_after} s")
        self.retry_after = retry_after


class EngineError(RuntimeError):
    """The engine broke off while it ran a request."""


class Job:
    """Requests that are answered together. Iterating gives (index of the request, event) until all have ended."""

    def __init__(self, worker: "EngineWorker", requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self.open = set(range(len(requests)))
        self.started = time.monotonic()
        self.events: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self.left = False
        self._worker = worker

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.left = True
        if self.open:
            self._worker.cancel(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self.open and self.events.empty():
            raise StopAsyncIteration
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        return event


class EngineWorker:
    """Runs an engine.

    Args:
        make_engine: builds it; called in the thread, and again after a failure.
        queue: requests beyond the engine's slots.
        around: entered in the thread, such as an autocast.
        on_step: told of every step's seconds and events, in the loop.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        queue: int = 64,
        around: AbstractContextManager[Any] | None = None,
        on_step: Callable[[float, Sequence[Event]], None] = lambda seconds, events: None,
    ) -> None:
        self._make_engine, self._queue, self._on_step = make_engine, queue, on_step
        self._around = around or nullcontext()
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._jobs: dict[int, tuple[Job, int]] = {}  # by the engine's number; the thread's own
        self._seconds = 1.0  # of a request, a moving average
        self.active = 0
        self.slots = 0
        self.state_bytes = 0

    # --- on the loop ---

    async def start(self) -> None:
        """Build the engine; returns once it takes requests."""
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        await self._ready

    async def stop(self) -> None:
        """End the thread after its current step; what still runs is dropped."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def capacity(self) -> int:
        """Requests that are taken in at a time."""
        return self.slots + self._queue

    def submit(self, requests: Sequence[Request]) -> Job:
        """Take in requests, all or none. `BusyError` when the queue has no room, `EngineError` without an engine."""
        if not self.alive:
            raise EngineError("the engine has stopped")
        if self.active + len(requests) > self.capacity:
            wait = self._seconds * (self.active + len(requests) - self.capacity) / self.slots
            raise BusyError(min(60, max(1, math.ceil(wait))))
        job = Job(self, requests)
        self.active += len(requests)
        self._inbox.put(lambda engine: self._take(engine, job))
        return job

    def cancel(self, job: Job) -> None:
        """End what still runs of a job."""
        self._inbox.put(lambda engine: self._drop(engine, job))

    async def call(self, function: Callable[[], Result]) -> Result:
        """Run a function in the engine's thread, between two steps: the model belongs to that thread."""
        future: asyncio.Future[Result] = self._loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def command(engine: Engine) -> None:
            try:
                result, error = function(), None
            except Exception as raised:
                result, error = None, raised
            self._tell(settle, result, error)

        self._inbox.put(command)
        return await future

    def _heard(self, seconds: float, events: Sequence[tuple[Job, int, Event]]) -> None:
        for job, index, event in events:
            if event.finish is not None:
                job.open.discard(index)
                self.active -= 1
                if event.finish != "cancelled":
                    self._seconds += 0.1 * (time.monotonic() - job.started - self._seconds)
            job.events.put_nowait((index, event))
        self._on_step(seconds, [event for _, _, event in events])

    def _failed(self, job: Job, error: Exception) -> None:
        self.active -= len(job.open)
        job.open.clear()
        job.events.put_nowait(error)

    # --- in the thread ---

    def _work(self) -> None:
        with self._around:
            try:
                engine = self._build()
                # The first pass compiles and allocates; a model that cannot run at all shows it here.
                engine.complete([Request([engine.tokenizer.end_of_text], 2)])
            except Exception as error:
                self._tell(self._ready.set_exception, error)
                return
            self._tell(self._ready.set_result, None)
            while True:
                while engine.idle or not self._inbox.empty():
                    command = self._inbox.get()
                    if command is None:
                        return
                    command(engine)
                started = time.perf_counter()
                try:
                    events = engine.step()
                except Exception as error:
                    log.exception("the engine failed; what ran is answered with an error, and a new engine goes on")
                    for job in {id(job): job for job, _ in self._jobs.values()}.values():
                        self._tell(self._failed, job, EngineError(f"the engine failed: {error}"))
                    self._jobs.clear()
                    engine = self._build()
                    continue
                seconds = time.perf_counter() - started
                told = [(*self._jobs[event.request], event) for event in events if event.request in self._jobs]
                for event in events:
                    if event.finish is not None:
                        self._jobs.pop(event.request, None)
                self.state_bytes = engine.state_bytes
                self._tell(self._heard, seconds, told)

    def _build(self) -> Engine:
        engine = self._make_engine()
        self.slots, self.state_bytes = engine.slots, engine.state_bytes
        return engine

    def _take(self, engine: Engine, job: Job) -> None:
        numbers: list[int] = []
        try:
            for request in job.requests:
                numbers.append(engine.submit(request))
        except ValueError as error:
            for number in numbers:  # of which nobody is told
                engine.cancel(number)
            self._tell(self._failed, job, error)
            return
        self._jobs |= {number: (job, index) for index, number in enumerate(numbers)}
        if job.left:  # before it was taken
            self._drop(engine, job)

    def _drop(self, engine: Engine, job: Job) -> None:
        for number in [number for number, (owner, _) in self._jobs.items() if owner is job]:
            engine.cancel(number)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits any more
            if not self._loop.is_closed():
                raise
