"""What cannot be written is named, and what is written can be read by whom the process lets."""

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


def share_alike(folder: Path, like: str) -> None:
    """Let a folder's safetensors files be read by all who may read its file `like`, which Python opened: safetensors
    makes its own for their owner alone, whatever the umask."""
    mode = (folder / like).stat().st_mode & 0o777
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)
