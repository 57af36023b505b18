import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gdn2.data.lock import FolderLock


def child(act: Callable[[], None]) -> int:
    """Run `act` in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


def hold(folder: Path) -> int:
    """A process that holds the lock until it is killed; returns once it does."""

    def act() -> None:
        with FolderLock(folder):
            (folder / "held").touch()
            time.sleep(60)

    pid = child(act)
    while not (folder / "held").exists():
        time.sleep(0.01)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_second_process_is_refused_and_the_first_named(tmp_path: Path) -> None:
    pid = hold(tmp_path / "run")
    try:
        with pytest.raises(ValueError, match=rf"run' is in use by process {pid} on .* since \d{{4}}-.*; wait for it"):
            FolderLock(tmp_path / "run").__enter__()
    finally:
        kill(pid)


def test_lock_of_a_killed_process_is_taken_over_and_told(tmp_path: Path) -> None:
    pid = hold(tmp_path)
    kill(pid)
    assert (tmp_path / "lock").exists()
    with FolderLock(tmp_path) as lock:
        assert lock.left_by is not None
        assert lock.left_by.startswith(f"process {pid} on ")
    assert not (tmp_path / "lock").exists()
    with FolderLock(tmp_path) as lock:
        assert lock.left_by is None


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"\xff"])
def test_half_written_note_is_no_obstacle(tmp_path: Path, note: bytes) -> None:
    (tmp_path / "lock").write_bytes(note)
    with FolderLock(tmp_path) as lock:
        assert lock.left_by == ("another process" if note else None)


def test_folder_made_for_nothing_goes_again_and_what_is_in_it_stays(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / "lock").is_file()
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with FolderLock(tmp_path / "mine"):
        pass
    assert os.listdir(tmp_path / "mine") == ["notes"]
    with pytest.raises(ValueError, match="is a file, and a folder was expected"):
        FolderLock(tmp_path / "mine" / "notes").__enter__()


def test_many_processes_take_turns(tmp_path: Path) -> None:
    """Each counts up a number that it reads and writes in two steps; lost turns would lose counts."""
    (tmp_path / "count").write_text("0")

    def act() -> None:
        done = 0
        while done < 20:
            try:
                with FolderLock(tmp_path):
                    count = int((tmp_path / "count").read_text())
                    os.sched_yield()
                    (tmp_path / "count").write_text(str(count + 1))
                    done += 1
            except ValueError:
                pass

    pids = [child(act) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert (tmp_path / "count").read_text() == "80"
