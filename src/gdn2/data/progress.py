"""How far `prepare` is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

QUIET_SECONDS = 10.0  # at most, between two plain lines


class Progress(NamedTuple):
    """How far `prepare` is; `skipped` names a file that was just left out. A total of 0 bytes is an unknown one."""

    done_bytes: int
    total_bytes: int
    documents: int
    tokens: int
    skipped: str | None = None


Report = Callable[[Progress], None]


@contextmanager
def show_progress(stream: IO[str] | None = None) -> Iterator[Report]:
    """A callback for `prepare`: a progress bar when `stream` (standard output) is a terminal, else plain lines."""
    stream = stream or sys.stdout
    if stream.isatty():
        with _bar(stream) as report:
            yield report
    else:
        yield _Lines(stream)


class _Lines:
    """A line per tenth of the bytes, one whenever QUIET_SECONDS have passed without, and one per file left out."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._tenth = 0
        self._last = time.monotonic()
        self._skipped: str | None = None

    def __call__(self, p: Progress) -> None:
        if p.skipped != self._skipped:
            print(f"left out, no UTF-8 text: {p.skipped}", file=self._stream, flush=True)
            self._skipped = p.skipped
        tenth = 10 * p.done_bytes // max(p.total_bytes, 1)
        now = time.monotonic()
        if tenth > self._tenth or now - self._last > QUIET_SECONDS:
            percent = 100 * p.done_bytes // max(p.total_bytes, 1)
            line = f"{percent:3d} %  {p.documents:,} documents  {p.tokens:,} tokens"
            print(line, file=self._stream, flush=True)
            self._tenth, self._last = tenth, now


@contextmanager
def _bar(stream: IO[str]) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(TextColumn("{task.fields[note]}"), *columns, console=Console(file=stream, highlight=False)) as bar:
        task = bar.add_task("prepare", note="", total=None)
        last: list[str | None] = [None]

        def report(p: Progress) -> None:
            if p.skipped != last[0]:
                bar.console.print(f"left out, no UTF-8 text: {p.skipped}", markup=False)
                last[0] = p.skipped
            bar.update(
                task, completed=p.done_bytes, total=p.total_bytes, note=f"{p.documents:,} documents {p.tokens:,} tokens"
            )

        yield report
