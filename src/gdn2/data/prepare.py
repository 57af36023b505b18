"""Text to token shards: read, tokenize, split by document, write, hash; a folder appears whole or not at all."""

import hashlib
import os
import shutil
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, NamedTuple

import numpy as np

from gdn2.data.shards import DTYPES, SPLITS, VERSION, Meta, SplitMeta, sha256_of
from gdn2.data.text import NotTextError, describe, find_sources, read_documents
from gdn2.data.tokenizer import load_tokenizer

ENDINGS = (".bin", ".idx.npy")
QUIET_SECONDS = 10.0  # at most, between two plain lines


class Progress(NamedTuple):
    """How far `prepare` is; `skipped` names a file that was just left out."""

    done_bytes: int
    total_bytes: int
    documents: int
    tokens: int
    skipped: str | None = None


Report = Callable[[Progress], None]


def prepare(
    out: str | Path,
    sources: Sequence[str | Path] = (),
    *,
    corpus: str | None = None,
    documents: Mapping[str, Iterable[str]] = MappingProxyType({}),
    tokenizer: str = "bytes",
    field: str = "text",
    val_share: float = 0.05,
    seed: int = 0,
    progress: Report | None = None,
) -> Meta:
    """Write the folder of token shards `out` from files and folders, or from a named `corpus` ("stdlib").

    A file is a document; of .jsonl and .parquet files each record's `field` is one. `documents` are further texts that
    follow, or all there is, under names that meta.json lists among the sources. Which split a document goes to is a
    hash of its text and `seed`, so it does not move when other documents come or go, and copies stay together.
    Documents without a token are left out. A file found in a folder that is not UTF-8 is left out and named in
    meta.json; named itself, it is an error. `progress` hears of every document.

    ValueError for bad input, FileExistsError when `out` is there already; after any error nothing is left behind.
    """
    out = Path(out)
    if not 0 < val_share < 1:
        raise ValueError(f"val_share is {val_share!r}; expected a number in (0, 1): training needs text to validate on")
    if os.path.lexists(out):
        raise FileExistsError(f"{str(out)!r} exists already; choose another folder or remove it first")
    alone = documents and not sources and corpus is None
    files = [] if alone else find_sources(sources, corpus)
    tokens = load_tokenizer(tokenizer)
    total = sum(file.size for file in files)
    dtype = "uint16" if tokens.vocab_size <= 1 << 16 else "uint32"
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        skipped: list[str] = []
        done = empty = 0
        with SplitWriter(temporary / "train.bin", dtype) as train, SplitWriter(temporary / "val.bin", dtype) as val:

            def add(text: str) -> None:
                nonlocal empty
                ids = tokens.encode(text)
                if not ids:
                    empty += 1
                    return
                raw = text.encode("utf-8")
                writer = val if _falls_into_val(raw, val_share, seed) else train
                writer.add([*ids, tokens.end_of_text], len(raw))

            def tell(done_bytes: int) -> None:
                if progress is not None:
                    written = (train.documents + val.documents, train.tokens + val.tokens)
                    progress(Progress(done_bytes, total, *written, skipped[-1] if skipped else None))

            for file in files:
                size = file.size
                try:
                    for text, share in read_documents(file, field):
                        add(text)
                        tell(done + int(share * size))
                except NotTextError:
                    if file.explicit:
                        raise
                    skipped.append(file.name)
                done += size
                tell(done)
            for text in chain.from_iterable(documents.values()):
                add(text)
                tell(done)
        _check_split(train, val, val_share)
        tokens.save(temporary)
        meta = Meta(
            version=VERSION,
            tokenizer=tokens.name,
            vocab_size=tokens.vocab_size,
            end_of_text=tokens.end_of_text,
            dtype=dtype,
            seed=seed,
            val_share=val_share,
            train=train.meta(),
            val=val.meta(),
            empty_documents=empty,
            sources=[*describe(sources, corpus), *documents],
            skipped=skipped,
            sha256={f"{split}{end}": sha256_of(temporary / f"{split}{end}") for split in SPLITS for end in ENDINGS},
        )
        meta.write(temporary)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return meta


class SplitWriter:
    """Appends documents to a token file; leaving without an error writes the offsets of their starts beside it."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self._dtype = path, DTYPES[dtype]
        self._file: IO[bytes] = path.open("wb")
        self._starts = array("q", [0])
        self._bytes = 0

    def add(self, ids: list[int], size: int) -> None:
        self._file.write(np.array(ids, self._dtype).tobytes())
        self._starts.append(self.tokens + len(ids))
        self._bytes += size

    @property
    def documents(self) -> int:
        return len(self._starts) - 1

    @property
    def tokens(self) -> int:
        return self._starts[-1]

    def meta(self) -> SplitMeta:
        return SplitMeta(self.documents, self.tokens, self._bytes)

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            np.save(self._path.with_suffix(".idx.npy"), np.array(self._starts, "<i8"))


def _falls_into_val(raw: bytes, val_share: float, seed: int) -> bool:
    digest = hashlib.blake2b(raw, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") < val_share * 2**64


def _check_split(train: SplitWriter, val: SplitWriter, val_share: float) -> None:
    if train.documents + val.documents == 0:
        raise ValueError("the sources hold no text")
    if train.documents == 0 or val.documents == 0:
        missing = "training" if train.documents == 0 else "validation"
        raise ValueError(
            f"no document of {train.documents + val.documents} fell into the {missing} split (val_share {val_share}); "
            "a document goes to one split whole: give more documents (a long file cut in parts), or another seed"
        )


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
