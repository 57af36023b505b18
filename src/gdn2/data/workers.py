"""Pieces tokenized by several processes, or by this one."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

from gdn2.data.parts import Part, Recipe, write_part
from gdn2.data.text import Document
from gdn2.data.tokenizer import Tokenizer, load_tokenizer

_tokenizer: Tokenizer | None = None


class Readable(Protocol):
    """A piece of text: `pieces.Piece` or `hub.HubPiece`. It goes to another process by pickle."""

    @property
    def size(self) -> int: ...

    @property
    def identity(self) -> list[object]: ...

    def read(self, field: str, skipped: list[str]) -> Iterator[Document]: ...


Tell = Callable[[float, int, int], None]  # share of the piece, documents, tokens


def tokenize(piece: Readable, folder: Path, tokenizer: Tokenizer, recipe: Recipe, tell: Tell | None = None) -> Part:
    """Write the part of one piece. ValueError when a file changed meanwhile."""
    before, skipped, share = piece.identity, list[str](), 0.0

    def texts() -> Iterator[str]:
        nonlocal share
        for document in piece.read(recipe.field, skipped):
            share = document.share
            yield document.text

        if piece.identity != before:
            raise ValueError(f"{before[0]} changed while it was read; repeat the command")

    return write_part(folder, texts(), skipped, tokenizer, recipe, lambda *counts: tell and tell(share, *counts))


def tokenize_all(
    pieces: Sequence[tuple[Readable, Path]], tokenizer: Path, recipe: Recipe, workers: int
) -> Iterator[tuple[Readable, Part]]:
    """Write the parts of pieces with several processes; yields them as they are done, in any order.

    After an error what is being read is finished, and the rest is not begun. Workers whose parent is killed end too.
    ChildProcessError where a worker is killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (tokenizer,))
    try:
        jobs = {pool.submit(_run, piece, folder, recipe): piece for piece, folder in pieces}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of {workers} worker processes was killed, perhaps since memory ran out; fewer workers need less"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(tokenizer: Path) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _tokenizer = load_tokenizer(tokenizer)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def end_with_parent() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run(piece: Readable, folder: Path, recipe: Recipe) -> Part:
    assert _tokenizer is not None
    return tokenize(piece, folder, _tokenizer, recipe)
