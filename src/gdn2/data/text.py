"""Documents out of files: text, folders of text, JSON lines, Parquet, and the interpreter's own standard library."""

import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

CORPORA = ("stdlib",)
# Not the library a programmer reads: tests, installed packages, applications, code tables and generated text.
STDLIB_EXCLUDED = {
    "test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings",
    "pydoc_data", "__phello__",
}  # fmt: skip


class NotTextError(ValueError):
    """A file that is not UTF-8, or no file at all."""


class Document(NamedTuple):
    """A text, and how much of its file is read once it has come: a share in [0, 1]."""

    text: str
    share: float


@dataclass(frozen=True)
class Source:
    """One file; `explicit` when the user named it, rather than a walk found it. `root` is what its name leaves out."""

    path: Path
    explicit: bool
    root: Path | None = None

    @property
    def name(self) -> str:
        return str(self.path.relative_to(self.root) if self.root else self.path)

    @property
    def size(self) -> int:
        """Bytes; 0 for a broken link and for what is no regular file."""
        return self.path.stat().st_size if self.path.is_file() else 0


def find_sources(sources: Sequence[str | Path], corpus: str | None = None) -> list[Source]:
    """Every file to read, in a fixed order: as named, folders walked by sorted name without hidden entries. Links to
    folders are not followed, which might come to the same file twice; they are among the files, and are no text.

    ValueError when nothing is named, a source does not exist, a folder is empty, two sources hold the same file or the
    corpus is unknown.
    """
    if (corpus is None) == (not sources):
        raise ValueError("give either files and folders or a corpus, one of the two")
    if corpus is not None:
        if corpus not in CORPORA:
            raise ValueError(f"corpus is {corpus!r}; expected one of {', '.join(CORPORA)}")
        root = Path(sysconfig.get_paths()["stdlib"])
        return [Source(path, explicit=False, root=root) for path in _library_files(root)]
    found: list[list[Source]] = []
    for name in map(Path, sources):
        if name.is_dir():
            walked = list(_walk(name))
            if not walked:
                raise ValueError(f"folder {str(name)!r} holds no files")
            found.append([Source(path, explicit=False) for path in walked])
        elif name.is_file():
            found.append([Source(name, explicit=True)])
        else:
            raise ValueError(f"source {str(name)!r} does not exist")
    if len(sources) > 1:
        _check_apart(sources, found)
    return [file for files in found for file in files]


def _check_apart(sources: Sequence[str | Path], found: Sequence[list[Source]]) -> None:
    """ValueError where two sources come to the same file, by whatever path: its documents would be read twice."""
    first: dict[str, int] = {}
    for number, files in enumerate(found):
        for file in files:
            other = first.setdefault(os.path.realpath(file.path), number)
            if other != number:
                raise ValueError(
                    f"the file {str(file.path)!r} is in two sources, {str(sources[other])!r} and "
                    f"{str(sources[number])!r}; expected each file in one"
                )


def describe(sources: Sequence[str | Path], corpus: str | None) -> list[str]:
    """Where the text came from, for meta.json."""
    if corpus is not None:
        return [f"{corpus}: {platform.python_implementation()} {platform.python_version()}"]
    return [str(s) for s in sources]


def read_documents(source: Source, field: str = "text", start: int = 0, stop: int | None = None) -> Iterator[Document]:
    """The documents of one file: each record's `field` of .jsonl and .parquet, else the whole file as one.

    A single document must fit in memory; a file of records need not. `start` and `stop` take a range of it: the lines
    of .jsonl that start at those bytes, the row groups of .parquet. NotTextError for a text file that is not UTF-8, a
    broken link and what is no regular file; ValueError with file and line for a record that is not JSON or whose field
    is missing or no text.
    """
    if not source.path.is_file():
        raise NotTextError(f"{source.path}: a broken link, a link to a folder, or no regular file")
    if source.path.suffix == ".jsonl":
        yield from _jsonl(source.path, field, start, stop)
    elif source.path.suffix == ".parquet":
        yield from _parquet(source.path, field, start, stop)
    else:
        try:
            yield Document(source.path.read_bytes().decode("utf-8"), 1.0)
        except UnicodeDecodeError as error:
            raise NotTextError(f"{source.path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        links = [f for f in folders if Path(parent, f).is_symlink()]
        yield from (Path(parent, f) for f in sorted(files + links) if not f.startswith("."))


def _library_files(root: Path) -> list[Path]:
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if STDLIB_EXCLUDED.isdisjoint(path.parts)]


def _jsonl(path: Path, field: str, start: int, stop: int | None) -> Iterator[Document]:
    stop = path.stat().st_size if stop is None else stop
    with path.open("rb") as lines:
        if start:
            lines.seek(start - 1)
            lines.readline()  # the rest of a line that the range before has read, or its end alone
        place, number = lines.tell(), 0
        while place < stop and (line := lines.readline()):
            place += len(line)
            number += 1
            if line.strip():
                try:
                    text = _field(line, field)
                except ValueError as error:
                    raise ValueError(f"{path}:{_lines_before(path, start) + number}: {error}") from error
                yield Document(text, min(1.0, (place - start) / (stop - start)))


def _field(line: bytes, field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested thousands deep
        raise ValueError(f"not a line of JSON: {error}") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"no text in field {field!r}; expected an object that has it")
    return whole_text(text)


def _lines_before(path: Path, start: int) -> int:
    """Lines that start before byte `start`; only an error asks."""
    with path.open("rb") as file:
        before = file.read(start)
    return before.count(b"\n") + (not before.endswith(b"\n") and start > 0)


def open_parquet(path: Path) -> Any:
    """ValueError without the package pyarrow, or for a file that is none of Parquet's."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs the package pyarrow: pip install 'gdn2[data]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error


def _parquet(path: Path, field: str, start: int, stop: int | None) -> Iterator[Document]:
    with open_parquet(path) as file:
        import pyarrow

        if field not in file.schema_arrow.names:
            raise ValueError(f"{path}: no column {field!r}; expected one of {', '.join(file.schema_arrow.names)}")
        wanted = range(start, file.num_row_groups if stop is None else stop)
        sizes = [file.metadata.row_group(i).num_rows for i in range(wanted.stop)]
        first, total = sum(sizes[:start]), sum(sizes[start:])
        groups, row = file.iter_batches(batch_size=256, columns=[field], row_groups=list(wanted)), first
        while True:
            try:
                texts = next(groups).column(0).to_pylist()
            except StopIteration:
                return
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise ValueError(f"{path}: damaged after row {row}: {error}") from error
            for text in texts:
                row += 1
                if not isinstance(text, str):
                    raise ValueError(f"{path}: row {row} of column {field!r} is {type(text).__name__}; expected text")
                yield Document(text, (row - first) / total)


def whole_text(text: str) -> str:
    """`text`, which JSON's escapes may have given half of a surrogate pair that no UTF-8 can hold: then ValueError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"not Unicode text ({error.reason} at character {error.start})") from error
    return text
