"""A signal while `gdn2 train` starts: it ends with 0, Ctrl-C with 130, and the run can be started or gone on with."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
from trained import quiet

from gdn2.config import RunConfig, write_config
from gdn2.data.lock import FolderLock
from gdn2.training import checkpoint

MakeConfig = Callable[..., RunConfig]
WORKER = Path(__file__).with_name("train_worker.py")
EARLY = "before training began; nothing was written, the same command starts it again\n"
CODES = {"SIGTERM": 0, "SIGINT": 130}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def new(make_config: MakeConfig, tmp_path: Path) -> list[Any]:
    """Arguments of a new run."""
    (tmp_path / "new").mkdir()
    write_config(tmp_path / "new", make_config("train.tokens=512"))
    return [tmp_path / "new" / "config.yaml", "--run", tmp_path / "run"]


@pytest.fixture
def half(make_config: MakeConfig, tmp_path: Path) -> tuple[Path, Path]:
    """A whole run of 20 steps, and one that was killed after 10."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    quiet(make_config(), whole)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step_00000020")
    return whole, run


@pytest.mark.parametrize(
    ("name", "stage"),
    [("SIGTERM", s) for s in ("configuration", "lock", "data", "folder", "model", "optimizer")]
    + [("SIGINT", "configuration"), ("SIGINT", "data"), ("SIGINT", "model")],
)
def test_signal_before_anything_is_written_ends_at_once(new: list[Any], tmp_path: Path, name: str, stage: str) -> None:
    assert ranks.run(1, WORKER, f"{name} in {stage}", *new) == ([CODES[name]], f"stopped by {name} {EARLY}")
    assert not (tmp_path / "run").exists()
    codes, out = ranks.run(1, WORKER, "", *new)
    assert codes == [0], out
    assert checkpoint.checkpoints(tmp_path / "run")[-1].name == "step_00000004"


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("stage", ["folder", "checkpoint", "load"])
def test_signal_to_a_run_that_goes_on_leaves_it_as_it_was(half: tuple[Path, Path], name: str, stage: str) -> None:
    whole, run = half
    before = files(run)
    code, out = ranks.run(1, WORKER, f"{name} in {stage}", "--run", run, "--resume")
    assert (code, out) == ([CODES[name]], f"stopped by {name} {EARLY}")
    assert files(run) == before
    codes, out = ranks.run(1, WORKER, "", "--run", run, "--resume")
    assert codes == [0], out
    last = "checkpoints/step_00000020/optimizer.safetensors"
    assert (run / last).read_bytes() == (whole / last).read_bytes()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", ["writing", "logs"])
def test_signal_once_writing_has_begun_saves_before_the_first_step(
    make_config: MakeConfig, new: list[Any], tmp_path: Path, size: int, stage: str
) -> None:
    run = tmp_path / "run"
    codes, out = ranks.run(size, WORKER, f"SIGTERM in {stage}", *new)
    assert codes == [0] * size, out
    assert f"step 0/4  stopped by SIGTERM, saved; go on with: gdn2 train --run {run} --resume" in out
    assert [p.name for p in checkpoint.checkpoints(run)] == ["step_00000000"]
    codes, out = ranks.run(size, WORKER, "", "--run", run, "--resume")
    assert codes == [0] * size, out
    if size == 1:
        quiet(make_config("train.tokens=512"), tmp_path / "whole")
        last = "checkpoints/step_00000004/optimizer.safetensors"
        assert (run / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


@pytest.mark.parametrize(("rank", "stage"), [(0, "data"), (1, "configuration"), (1, "folder"), (1, "model")])
def test_signal_to_one_rank_that_starts_ends_all(new: list[Any], tmp_path: Path, rank: int, stage: str) -> None:
    codes, out = ranks.run(2, WORKER, f"SIGTERM in {stage} of {rank}", *new)
    assert codes == [0, 0], out
    assert out == f"stopped by SIGTERM {EARLY}"
    assert not (tmp_path / "run").exists()


def test_signal_while_other_ranks_do_not_come_ends_soon(new: list[Any], tmp_path: Path) -> None:
    """The other rank is not there at all; without a signal it would be waited for 600 s."""
    began = time.monotonic()
    codes, out = ranks.run(1, WORKER, "SIGTERM alone", *new)
    assert codes == [1], out
    assert "gdn2: error: rank 0 of 2: stopped by a signal while it waited for other ranks, which did not come" in out
    assert time.monotonic() - began < 60
    assert not (tmp_path / "run").exists()


def test_rank_that_is_refused_ends_all_with_its_reason(new: list[Any], tmp_path: Path) -> None:
    """No launcher ends the others here; they would wait 600 s."""
    run, began = tmp_path / "run", time.monotonic()
    with FolderLock(run):
        codes, out = ranks.run(2, WORKER, "", *new)
    assert codes == [2, 2], out
    reason = f"'{run}' is in use by process {os.getpid()} on "
    assert f"gdn2: error: {reason}" in out
    assert f"gdn2: error: rank 0 of 2: {reason}" in out
    codes, out = ranks.run(2, WORKER, "refused", *new)
    assert codes == [2, 2], out
    assert "gdn2: error: rank 1 of 2: " in out
    assert out.count("/shards holds no tokenizer\n") == 2
    assert not run.exists()
    assert time.monotonic() - began < 60
    codes, out = ranks.run(2, WORKER, "", *new)
    assert codes == [0, 0], out


def test_refused_rank_says_why_while_others_do_not_come(new: list[Any], tmp_path: Path) -> None:
    codes, out = ranks.run(1, WORKER, "refused alone", *new, "parallel.timeout=3")
    assert codes == [2], out
    waits, error = out.splitlines()
    assert waits.startswith("rank 0 of 2 waits for the others to tell them: ")
    assert error.startswith("gdn2: error: ")
    assert waits.endswith("/shards holds no tokenizer")
    assert error.endswith("/shards holds no tokenizer")


def test_command_itself_hears_a_signal_while_it_reads_its_configuration(new: list[Any], tmp_path: Path) -> None:
    """The file is a pipe: that it is open for reading tells where the command is."""
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "gdn2", "train", str(pipe), *map(str, new[1:])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with pipe.open("w") as file:
        process.send_signal(signal.SIGTERM)
        file.write(new[0].read_text())
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"stopped by SIGTERM {EARLY}")
    assert not (tmp_path / "run").exists()
