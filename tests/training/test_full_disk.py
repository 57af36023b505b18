"""A disk that is full for another file than a checkpoint: one line says which, and what the newest checkpoint is."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import call
from trained import quiet

from gdn2.config import RunConfig, write_config
from gdn2.data.lock import FolderLock

MakeConfig = Callable[..., RunConfig]
PAGE = os.sysconf("SC_PAGESIZE")
FULL = r"could not be written ([Errno 28] No space left on device)"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "gdn2-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, pages: int = 0) -> None:
    """Leave so many pages of a file system free."""
    (disk / "filler").unlink(missing_ok=True)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - pages * PAGE
    (disk / "filler").write_bytes(bytes(free))


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert call("train", *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("gdn2: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    write_config(tmp_path / "own", make_config("train.log_every=1"))
    return tmp_path / "own" / "config.yaml"


@pytest.mark.parametrize(("pages", "name"), [(0, "lock"), (1, "config.yaml")])
def test_full_from_the_start_leaves_nothing(
    disk: Path, config: Path, capsys: pytest.CaptureFixture[str], pages: int, name: str
) -> None:
    run = disk / "run"
    fill(disk, pages)
    assert f"{run / name} {FULL}; no checkpoint was written" in refused(capsys, config, "--run", run)
    assert not run.exists()
    (disk / "filler").unlink()
    assert call("train", config, "--run", run) == 0


def test_full_for_rows_names_the_newest_checkpoint_from_which_the_run_goes_on(
    disk: Path,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    on_batch: Callable[[int, Callable[[], None]], None],
) -> None:
    run = disk / "run"
    on_batch(2 * 12, lambda: fill(disk))  # in the twelfth step; rows still fit into the last page of their file
    newest = f"the newest checkpoint is {run / 'checkpoints' / 'step_00000010'}"
    assert f"{run / 'metrics.jsonl'} {FULL}; {newest}" in refused(capsys, config, "--run", run)
    # still full, the run cannot go on, and what there is stays
    before = (run / "metrics.jsonl").read_bytes()
    fill(disk)
    assert f"{run / 'lock'} {FULL}; {newest}" in refused(capsys, "--run", run, "--resume")
    fill(disk, 1)
    assert f"{run / 'metrics.jsonl'} {FULL}; {newest}" in refused(capsys, "--run", run, "--resume")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert {p.name for p in run.iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints"}
    (disk / "filler").unlink()
    assert call("train", "--run", run, "--resume") == 0


@pytest.mark.parametrize(
    ("name", "owner", "function"),
    [
        ("lock", os, "pwrite"),
        ("config.yaml", Path, "write_text"),
        ("metrics.jsonl", Path, "open"),
    ],
)
def test_write_that_fails_is_named_wherever_tests_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, owner: Any, function: str
) -> None:
    plain = getattr(owner, function)

    def full(target: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "lock" or str(target).endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(target, *args, **kwargs)

    monkeypatch.setattr(owner, function, full)
    with pytest.raises(OSError, match=rf"{name} could not be written .*No space left") as failure:
        quiet(make_config(), tmp_path / "run")
    assert failure.value.__notes__ == ["no checkpoint was written"]
    monkeypatch.undo()
    with FolderLock(tmp_path / "run"):
        pass
