"""What may happen to a run from outside, for real: kills at any moment, a full disk, a second trainer."""

import errno
import io
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdn2.config import RunConfig
from gdn2.data.lock import FolderLock
from gdn2.training import CheckpointError, checkpoint, train

MakeConfig = Callable[..., RunConfig]
RowsOf = Callable[[Path], list[dict[str, Any]]]


def fork_training(config: RunConfig, run: Path, resume: bool, prepare: Callable[[], None] = lambda: None) -> int:
    """Train in a process of its own; its exit code is 0, or 3 for a CheckpointError, 4 for an OSError, else 1."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        prepare()
        train(config, run, resume, io.StringIO())
        code = 0
    except CheckpointError as error:
        (run.parent / "said").write_text(str(error))
        code = 3
    except OSError as error:
        (run.parent / "said").write_text(str(error))
        code = 4
    finally:
        os._exit(code)


def test_kills_at_random_moments_lose_nothing_that_was_saved(
    make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf
) -> None:
    """Checkpoints every step, so that most kills fall within one; then the run is finished and equals a whole one."""
    config = make_config("train.checkpoint_every=1", "train.eval_every=0", "train.tokens=20480")
    rng, run, killed = random.Random(0), tmp_path / "run", 0
    for _ in range(8):
        pid = fork_training(config, run, bool(checkpoint.checkpoints(run)))
        time.sleep(rng.uniform(0.15, 0.5))
        before = checkpoint.checkpoints(run)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        after = checkpoint.checkpoints(run)
        assert not before or (after and after[-1] >= before[-1])
        if after:
            assert checkpoint.verify(after[-1])["step"] == int(after[-1].name[5:])
        elif run.exists():
            shutil.rmtree(run)  # killed before its first checkpoint: begin again
    assert killed >= 4
    train(config, run, bool(checkpoint.checkpoints(run)), io.StringIO())
    whole = tmp_path / "whole"
    train(config, whole, False, io.StringIO())
    name = f"checkpoints/step_{config.steps:08d}/model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    steps = [row["step"] for row in rows_of(run) if row["kind"] == "train"]
    assert steps == [row["step"] for row in rows_of(whole) if row["kind"] == "train"]


def test_disk_that_takes_no_more_ends_the_run_in_words_and_keeps_the_last_checkpoint(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """A limit of the kernel's on the size of files: writes fail for real, in safetensors too."""
    run, config = tmp_path / "run", make_config("train.checkpoint_every=10")
    train(make_config("train.checkpoint_every=10", "optim.schedule=constant"), run, False, io.StringIO())
    size = (checkpoint.checkpoints(run)[-1] / "model.safetensors").stat().st_size
    config = make_config("train.checkpoint_every=10", "optim.schedule=constant", "train.tokens=5120")

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    code = os.waitpid(fork_training(config, run, True, fill), 0)[1]
    assert os.waitstatus_to_exitcode(code) == 3
    said = (tmp_path / "said").read_text()
    assert os.strerror(errno.EFBIG) in said
    assert "step_00000020" in said
    assert [p.name for p in checkpoint.checkpoints(run)] == ["step_00000010", "step_00000020"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]
    assert train(config, run, True, io.StringIO()).step == 40


def test_second_trainer_is_refused_before_anything_is_touched(make_config: MakeConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(make_config(), run, False, io.StringIO())
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with FolderLock(run):
        for resume in (True, False):
            with pytest.raises(ValueError, match=rf"run' is in use by process {os.getpid()} on "):
                train(make_config(), run, resume, io.StringIO())
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_trainer_that_died_is_told_of(make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf) -> None:
    run, config = tmp_path / "run", make_config("train.checkpoint_every=2", "train.tokens=128000")
    pid = fork_training(config, run, False)
    while not checkpoint.checkpoints(run):
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pid = fork_training(config, run, True)
    while not any(row.get("event", "").endswith("trained here and died") for row in rows_of(run)):
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == 0  # saved, and left with 0
    assert rows_of(run)[-1]["event"].startswith("stopped by SIGTERM, saved")
    assert not (run / "lock").exists()
