"""One process at a time in a folder: the kernel's file lock, which dies with its process, and a note of who has it.

A lock that a killed process left behind holds nobody up. On a network file system the lock is as good as that system's
`flock`.
"""

import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from gdn2.data.disk import writing

NAME = "lock"


class FolderLock:
    """Holds FOLDER/lock within its context; makes the folder where there is none, and removes it when still empty.

    `left_by` tells, within the context, of the process that held it and died, None when there was none.
    ValueError on entering while another process holds it; it names that process. OSError where it cannot be written,
    as on a full disk; then nothing of it is left.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None
        self.left_by: str | None = None

    def __enter__(self) -> "FolderLock":
        import fcntl  # not at the top: what needs no lock works where there is none

        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"{str(self._folder)!r} is not empty; it is a file, and a folder was expected")
        path = self._folder / NAME
        while self._file is None:
            with writing(path):
                self._folder.mkdir(parents=True, exist_ok=True)
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _describe(os.pread(file, 4096, 0))
                os.close(file)
                raise ValueError(
                    f"{str(self._folder)!r} is in use by {holder}; wait for it to end, or stop it first"
                ) from None
            try:
                same = os.path.samestat(os.fstat(file), path.stat())
            except FileNotFoundError:
                same = False
            if same:
                self._file = file
            else:  # its holder removed it between our opening and our locking
                os.close(file)
        left = os.pread(self._file, 4096, 0)
        self.left_by = _describe(left) if left else None
        note = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            with writing(path):
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, json.dumps(note).encode(), 0)
        except OSError:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        assert self._file is not None
        (self._folder / NAME).unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()


def _describe(note: bytes) -> str:
    try:
        values = json.loads(note)
        return f"process {values['pid']} on {values['host']} since {values['since']}"
    except (ValueError, KeyError, TypeError):  # killed, or not done, while it wrote
        return "another process"
