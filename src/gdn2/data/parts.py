"""Pieces of text tokenized into parts, whole or absent; parts joined into the files of a folder of shards."""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from gdn2.data.shards import DTYPES, SPLITS, SplitMeta, file_names, flush
from gdn2.data.tokenizer import Tokenizer

COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class Recipe:
    """What decides, besides its text, what becomes of a document."""

    dtype: str
    val_share: float
    seed: int
    field: str


@dataclass(frozen=True)
class Part:
    """A folder with the tokens of one piece, and counts."""

    folder: Path
    train: SplitMeta
    val: SplitMeta
    empty: int
    skipped: list[str]

    def split(self, name: str) -> SplitMeta:
        counts: SplitMeta = getattr(self, name)
        return counts


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


def write_part(
    folder: Path,
    documents: Iterable[str],
    skipped: Sequence[str],
    tokenizer: Tokenizer,
    recipe: Recipe,
    tell: Callable[[int, int], None],
) -> Part:
    """Write the part of some texts; `tell` hears of documents and tokens so far, after each.

    `skipped` is read once all texts are. A folder of that name, of another process that did the same, stays.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        empty = 0
        with (
            SplitWriter(temporary / "train.bin", recipe.dtype) as train,
            SplitWriter(temporary / "val.bin", recipe.dtype) as val,
        ):
            for text in documents:
                ids = tokenizer.encode(text)
                if ids:
                    raw = text.encode("utf-8")
                    writer = val if _falls_into_val(raw, recipe) else train
                    writer.add([*ids, tokenizer.end_of_text], len(raw))
                else:
                    empty += 1
                tell(train.documents + val.documents, train.tokens + val.tokens)
        counts = {"train": asdict(train.meta()), "val": asdict(val.meta()), "empty": empty, "skipped": list(skipped)}
        (temporary / "part.json").write_text(json.dumps(counts), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(temporary)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return read_part(folder)


def read_part(folder: Path) -> Part:
    values = json.loads((folder / "part.json").read_text(encoding="utf-8"))
    train, val = (SplitMeta(**values[name]) for name in SPLITS)
    return Part(folder, train, val, values["empty"], values["skipped"])


def join(parts: Sequence[Part], out: Path, split: str, dtype: str, shard_tokens: int) -> SplitMeta:
    """Write one split's files into `out`: tokens in files of `shard_tokens`, or one, and the offsets of all."""
    documents, tokens, size = (
        sum(getattr(p.split(split), key) for p in parts) for key in ("documents", "tokens", "bytes")
    )
    width = np.dtype(DTYPES[dtype]).itemsize
    pieces = (piece for part in parts for piece in _pieces(part.folder / f"{split}.bin"))
    _write_files(pieces, [out / name for name in file_names(split, tokens, shard_tokens)], shard_tokens * width)
    offsets = np.lib.format.open_memmap(out / f"{split}.idx.npy", mode="w+", dtype="<i8", shape=(documents + 1,))
    offsets[0], at, base = 0, 1, 0
    for part in parts:
        starts = np.load(part.folder / f"{split}.idx.npy")
        offsets[at : at + len(starts) - 1] = starts[1:] + base
        at, base = at + len(starts) - 1, base + int(starts[-1])
    offsets.flush()
    return SplitMeta(documents, tokens, size)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(COPY_BYTES):
            yield data


def _write_files(pieces: Iterator[bytes], paths: Sequence[Path], limit: int) -> None:
    """The bytes of `pieces` in files of `limit` bytes, the last with what is left; a single one takes all."""
    rest = b""
    for path in paths:
        room = limit if len(paths) > 1 else None
        with path.open("wb") as file:
            while (room is None or room > 0) and (rest or (rest := next(pieces, b""))):
                now = rest if room is None else rest[:room]
                file.write(now)
                rest = rest[len(now) :]
                room = None if room is None else room - len(now)


def _falls_into_val(raw: bytes, recipe: Recipe) -> bool:
    digest = hashlib.blake2b(raw, digest_size=8, key=str(recipe.seed).encode()).digest()
    return int.from_bytes(digest, "little") < recipe.val_share * 2**64
