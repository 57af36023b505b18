"""Documents out of files: text, folders of text, JSON lines, Parquet, and the interpreter's own standard library."""

import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CORPORA = ("stdlib",)
# Not the library a programmer reads: tests, installed packages, applications, code tables and generated text.
STDLIB_EXCLUDED = {
    "test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings",
    "pydoc_data", "__phello__",
}  # fmt: skip


class NotTextError(ValueError):
    """A file that is not UTF-8."""


@dataclass(frozen=True)
class Source:
    """One file; `explicit` when the user named it, rather than a walk found it."""

    path: Path
    explicit: bool


def find_sources(sources: Sequence[str | Path], corpus: str | None = None) -> list[Source]:
    """Every file to read, in a fixed order: as named, folders walked by sorted name without hidden entries.

    ValueError when nothing is named, a source does not exist, a folder is empty or the corpus is unknown.
    """
    if (corpus is None) == (not sources):
        raise ValueError("give either files and folders or a corpus, one of the two")
    if corpus is not None:
        if corpus not in CORPORA:
            raise ValueError(f"corpus is {corpus!r}; expected one of {', '.join(CORPORA)}")
        return [Source(path, explicit=False) for path in _stdlib_files()]
    found: list[Source] = []
    for name in map(Path, sources):
        if name.is_dir():
            walked = list(_walk(name))
            if not walked:
                raise ValueError(f"folder {str(name)!r} holds no files")
            found += [Source(path, explicit=False) for path in walked]
        elif name.is_file():
            found.append(Source(name, explicit=True))
        else:
            raise ValueError(f"source {str(name)!r} does not exist")
    return found


def describe(sources: Sequence[str | Path], corpus: str | None) -> list[str]:
    """Where the text came from, for meta.json."""
    if corpus is not None:
        return [f"{corpus}: {platform.python_implementation()} {platform.python_version()}"]
    return [str(s) for s in sources]


def read_documents(source: Source, field: str = "text") -> Iterator[str]:
    """The documents of one file: each record's `field` of .jsonl and .parquet, else the whole file as one.

    A single document must fit in memory; a file of records need not. NotTextError for a text file that is not
    UTF-8; ValueError with file and line for a record that is not JSON or whose field is missing or no text.
    """
    if source.path.suffix == ".jsonl":
        yield from _jsonl(source.path, field)
    elif source.path.suffix == ".parquet":
        yield from _parquet(source.path, field)
    else:
        try:
            yield source.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise NotTextError(f"{source.path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(parent, f) for f in sorted(files) if not f.startswith("."))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if STDLIB_EXCLUDED.isdisjoint(path.parts)]


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{path}:{number}: not a line of JSON: {error}") from error
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: no text in field {field!r}; expected an object that has it")
            yield _whole(text, f"{path}:{number}")


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs the package pyarrow: pip install 'gdn2[data]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    with file:
        if field not in file.schema_arrow.names:
            raise ValueError(f"{path}: no column {field!r}; expected one of {', '.join(file.schema_arrow.names)}")
        row = 0
        for group in file.iter_batches(batch_size=256, columns=[field]):
            for text in group.column(0).to_pylist():
                row += 1
                if not isinstance(text, str):
                    raise ValueError(f"{path}: row {row} of column {field!r} is {type(text).__name__}; expected text")
                yield text


def _whole(text: str, where: str) -> str:
    """`text`, which JSON's escapes may have given half of a surrogate pair that no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not Unicode text ({error.reason} at character {error.start})") from error
    return text
