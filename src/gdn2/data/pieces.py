"""Sources cut into pieces: what a worker reads in one go, and what a killed `prepare` need not read again."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gdn2.data.text import Document, NotTextError, Source, open_parquet, read_documents

PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece:
    """Some small files, or a range (see `read_documents`) of one large file."""

    files: tuple[Source, ...]
    start: int = 0
    stop: int | None = None
    size: int = 0  # bytes, for progress

    @property
    def identity(self) -> list[Any]:
        """What its text depends on: names, and sizes and times of change instead of the text itself."""
        stats = [(str(f.path), f.path.stat() if f.path.is_file() else None) for f in self.files]
        files = [(name, s and s.st_size, s and s.st_mtime_ns) for name, s in stats]
        return [files, [f.explicit for f in self.files], self.start, self.stop]

    def read(self, field: str, skipped: list[str]) -> Iterator[Document]:
        """Its documents, with shares of the piece; files of a folder that are no text are named in `skipped`."""
        done = 0
        for file in self.files:
            size = self.size if len(self.files) == 1 else file.size
            try:
                for text, share in read_documents(file, field, self.start, self.stop):
                    yield Document(text, (done + share * size) / max(self.size, 1))
            except NotTextError:
                if file.explicit:
                    raise
                skipped.append(file.name)
            done += size


def cut(files: Iterable[Source], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The pieces of the files, in their order: large ones of records cut in ranges, small ones taken together."""
    pieces: list[Piece] = []
    few: list[Source] = []

    def take() -> None:
        if few:
            pieces.append(Piece(tuple(few), size=sum(f.size for f in few)))
            few.clear()

    for file in files:
        size = file.size
        if size <= piece_bytes or file.path.suffix not in (".jsonl", ".parquet"):
            if few and sum(f.size for f in few) + size > piece_bytes:
                take()
            few.append(file)
            continue
        take()
        ranges = _byte_ranges(size, piece_bytes) if file.path.suffix == ".jsonl" else _row_groups(file, piece_bytes)
        pieces += [Piece((file,), start, stop, nbytes) for start, stop, nbytes in ranges]
    take()
    return pieces


def _byte_ranges(size: int, piece_bytes: int) -> Iterator[tuple[int, int, int]]:
    for start in range(0, size, piece_bytes):
        stop = min(start + piece_bytes, size)
        yield start, stop, stop - start


def _row_groups(file: Source, piece_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Row groups taken together up to `piece_bytes`, as they lie in the file."""
    with open_parquet(file.path) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        sizes = [sum(g.column(c).total_compressed_size for c in range(g.num_columns)) for g in groups]
    start = 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or sum(sizes[start : i + 1]) > piece_bytes:
            yield start, i, sum(sizes[start:i])
            start = i


def fingerprint(*values: Any) -> str:
    """A short name for plain values, the same for the same values only."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:20]
