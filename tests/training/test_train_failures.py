"""What `train` does when numbers or disks fail: bad steps are skipped, good checkpoints stay, words are clear."""

import importlib
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import quiet, tensors

from gdn2.config import RunConfig
from gdn2.model import LanguageModel
from gdn2.training import CheckpointError, TrainingError, checkpoint

module = importlib.import_module("gdn2.training.train")  # the package's name for it is the function
MakeConfig = Callable[..., RunConfig]
RowsOf = Callable[[Path], list[dict[str, Any]]]

CLOCK = {"elapsed", "tokens_per_second", "mfu", "memory"}


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of whole steps (two micro-batches each) NaN, and with it every gradient."""
    plain, calls = LanguageModel.loss, 0

    def loss(self: LanguageModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        value = plain(self, *args, **kwargs)
        if not self.training:
            return value
        calls += 1
        return value * float("nan") if (calls + 1) // 2 in steps else value

    monkeypatch.setattr(LanguageModel, "loss", loss)


def test_non_finite_step_is_skipped_counted_and_logged(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_of: RowsOf
) -> None:
    poison(monkeypatch, {4, 5, 9})
    config = make_config("train.max_bad_steps=3")
    assert quiet(config, tmp_path / "run").step == 20
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if "skipped" in row.get("event", "")] == [4, 5, 9]
    training = [row for row in rows if row["kind"] == "train"]
    assert training[-1]["bad_steps"] == 3
    assert training[1]["loss"] is not None  # steps 4 to 6: the mean of the good one
    assert all(torch.isfinite(t).all() for t in tensors(tmp_path / "run", 20).values())


def test_skipped_step_leaves_the_weights_alone(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("train.tokens=384", "train.checkpoint_every=1", "train.keep_last=3")
    poison(monkeypatch, {3})  # the last: validation finds the weights sound, so they are saved
    quiet(config, tmp_path / "run")
    first, second = tensors(tmp_path / "run", 2), tensors(tmp_path / "run", 3)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_no_checkpoint_within_bad_steps_so_the_last_good_one_stays(
    make_config: MakeConfig,
    tmp_path: Path,
    rows_of: RowsOf,
    monkeypatch: pytest.MonkeyPatch,
    on_batch: Callable[[int, Callable[[], None]], None],
) -> None:
    poison(monkeypatch, {*range(6, 10), 14})
    config = make_config("train.checkpoint_every=2", "train.keep_last=9", "train.tokens=1920")
    quiet(config, tmp_path / "run")  # 15 steps
    assert [int(p.name[5:]) for p in checkpoint.checkpoints(tmp_path / "run")] == [2, 4, 10, 12, 15]

    poison(monkeypatch, {5, 6, 7})
    on_batch(2 * 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = quiet(make_config("train.checkpoint_every=4"), tmp_path / "stopped")
    assert (outcome.step, outcome.interrupted) == (6, "SIGTERM")
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "stopped")] == ["step_00000004"]
    last = rows_of(tmp_path / "stopped")[-1]["event"]
    assert "stopped by SIGTERM, not saved, the last step was not finite; the newest checkpoint is " in last
    assert "step_00000004; go on with" in last


def break_weights(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """Make the n-th update of the optimizer leave the first parameter at `value`."""
    plain, calls = torch.optim.AdamW.step, 0

    def update(self: torch.optim.AdamW) -> None:
        nonlocal calls
        calls += 1
        plain(self)
        if calls == step:
            self.param_groups[0]["params"][0].data.fill_(value)

    monkeypatch.setattr(torch.optim.AdamW, "step", update)


def test_broken_weights_never_push_out_a_good_checkpoint(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_weights(monkeypatch, 6, math.inf)  # found by the steps that follow
    with pytest.raises(TrainingError, match=r"stopped at step 16: 10 steps in a row .*newest checkpoint is .*00000004"):
        quiet(make_config("train.checkpoint_every=4", "train.keep_last=1"), tmp_path / "between")
    assert all(torch.isfinite(t).all() for t in tensors(tmp_path / "between", 4).values())

    break_weights(monkeypatch, 8, math.nan)  # found by the checkpoint that is due
    message = r"stopped at step 8: parameter embedding\.weight is not finite; the newest checkpoint is .*00000004"
    with pytest.raises(TrainingError, match=message):
        quiet(make_config("train.checkpoint_every=4", "train.keep_last=1"), tmp_path / "due")
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "due")] == ["step_00000004"]

    monkeypatch.setattr(module, "validate", lambda *_: dict.fromkeys(("loss", "perplexity", "bits_per_byte"), math.nan))
    with pytest.raises(TrainingError, match=r"stopped at step 20: validation loss nan; the newest .*00000010"):
        quiet(make_config("train.keep_last=1"), tmp_path / "last")
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "last")] == ["step_00000010"]


@pytest.mark.parametrize("packed", ["false", "true"])
def test_steps_that_hold_no_byte_of_text_are_survived(
    make_config: MakeConfig, tmp_path: Path, packed: str, rows_of: RowsOf
) -> None:
    """One token a step: some targets are the end of a document, which is no byte, and packed some are none at all."""
    one = ("data.seq_len=1", "train.micro_batch=1", "train.batch_tokens=1", "train.log_every=1")
    few = ("train.tokens=600", "optim.warmup_tokens=0", "train.eval_every=0", "train.checkpoint_every=0")
    quiet(make_config(f"data.packed={packed}", *one, *few), tmp_path / "run")
    rows = [row for row in rows_of(tmp_path / "run") if row["kind"] == "train"]
    assert any(row["bits_per_byte"] is None for row in rows)
    assert (len(rows) < 600) == (packed == "true")


def test_persistent_non_finite_steps_stop_the_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(12, 99)))
    with pytest.raises(
        TrainingError,
        match=r"stopped at step 14: 3 steps in a row were not finite \(the last: loss nan, gradient norm nan\); "
        r"the newest checkpoint is .*step_00000010\. A lower optim\.lr",
    ):
        quiet(make_config("train.max_bad_steps=3"), tmp_path / "run")
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step_00000010"]
    poison(monkeypatch, set(range(1, 99)))
    with pytest.raises(TrainingError, match="no checkpoint was written"):
        quiet(make_config("train.max_bad_steps=3"), tmp_path / "other")


def test_full_disk_ends_the_run_and_names_the_last_checkpoint(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step_00000020" in str(path):
            raise OSError(28, "No space left on device")
        plain(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*newest whole checkpoint is .*step_00000010"):
        quiet(make_config(), tmp_path / "run")
    monkeypatch.setattr(checkpoint, "save_file", plain)
    assert quiet(make_config(), tmp_path / "run", resume=True).step == 20
