"""What cannot be written is named."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """A block that writes `path`. Its OSError, of a full disk say, which names no file, becomes one that names it;
    `temporary`, where it writes first, does not stay."""
    try:
        yield
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from error
