import importlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn2.config import ConfigError, RunConfig
from gdn2.training import TrainingError, train
from gdn2.training.logs import scalars
from gdn2.training.watch import ENOUGH, Watch, peak_memory

MakeConfig = Callable[..., RunConfig]
RowsOf = Callable[[Path], list[dict[str, Any]]]
module = importlib.import_module("gdn2.training.train")
GUESS = math.log(257)


def layer(**changes: float) -> dict[str, float]:
    return {"saturated_erase": 0.0, "saturated_write": 0.0, "state_rms": 1.0} | changes


def test_calm_steps_are_no_news() -> None:
    watch, noise = Watch(257), torch.Generator().manual_seed(0)
    for step in range(1, 2_000):
        loss = 2 + 3 / step + 0.05 * float(torch.randn((), generator=noise))
        norm = math.exp(0.3 * float(torch.randn((), generator=noise)))
        assert watch.step(step, loss, norm) == []


def test_spikes_are_told_once_in_a_while() -> None:
    watch = Watch(257)
    for step in range(1, ENOUGH + 1):
        assert watch.step(step, 2.0 + 0.01 * (step % 3), 1.0) == []
    assert watch.step(11, 2.4, 1.0) == ["warning: loss 2.400 is a spike: the median of the last steps is 2.010"]
    assert watch.step(12, 2.4, 11.0) == ["warning: gradient norm 11 is a spike: the median of the last steps is 1"]
    assert watch.step(13, 2.4, 11.0) == []
    assert len(watch.step(62, 3.0, 11.0)) == 2
    assert Watch(257).step(1, GUESS + 1.1, 1.0) == [f"warning: loss {GUESS + 1.1:.3f} is above 5.549, that of guessing"]


def test_saturated_gates_and_growing_memories_are_told_by_layer() -> None:
    watch = Watch(257)
    assert watch.layers(1, [layer(), layer(state_rms=2.0)]) == []
    assert watch.layers(2, [layer(saturated_erase=0.96), layer(state_rms=61.0)]) == [
        "warning: 96% of the erase gates of mixer 0 are at an end of their range",
        "warning: the memory of mixer 1 has grown from 2 to 61 (rms)",
    ]
    assert watch.layers(60, [layer(state_rms=math.nan), layer()]) == [
        "warning: the memory of mixer 0 has grown from 1 to nan (rms)"
    ]
    mamba = Watch(257)
    assert mamba.layers(1, [{"state_rms": 1.0}]) == []
    assert mamba.layers(2, [{"state_rms": 31.0}]) == ["warning: the memory of mixer 0 has grown from 1 to 31 (rms)"]


def test_diverging_run_is_warned_of_before_it_is_not_finite(
    make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that grow by a tenth with every step, as a rate far too high makes them, until float32 overflows."""
    plain = torch.optim.AdamW.step

    def grow(self: torch.optim.AdamW) -> None:
        plain(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data *= 1.1

    config = make_config(
        "train.log_every=1", "train.watch_every=5", "train.tokens=128000", "train.eval_every=0", "optim.clip=0",
        "train.checkpoint_every=0", "optim.schedule=constant", "train.max_bad_steps=1",
    )  # fmt: skip
    monkeypatch.setattr(torch.optim.AdamW, "step", grow)
    with pytest.raises(TrainingError):
        train(config, tmp_path / "run", stream=io.StringIO())
    events = [(row["step"], row["event"]) for row in rows_of(tmp_path / "run") if row["kind"] == "event"]
    bad = next(step for step, event in events if "not finite" in event)
    warned = [step for step, event in events if event.startswith("warning: ")]
    assert warned
    assert min(warned) < bad - 5


def test_rows_tell_layers_memory_and_utilisation(make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf) -> None:
    config = make_config("train.watch_every=4", "train.peak_flops=1e12")
    train(config, tmp_path / "run", stream=(out := io.StringIO()))
    rows = rows_of(tmp_path / "run")
    layers = [row for row in rows if row["kind"] == "layers"]
    assert [row["step"] for row in layers] == [4, 8, 12, 16, 20]
    assert set(layers[0]["layers"][0]) == {
        "mean_erase", "mean_write", "mean_decay", "saturated_erase", "saturated_write", "state_rms",
    }  # fmt: skip
    flops = module.describe(config.model, config.data.seq_len).training_flops
    for row in (row for row in rows if row["kind"] == "train"):
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 1e12)
        assert 10e6 < row["memory"] <= peak_memory(torch.device("cpu"))
    assert "state_rms" not in out.getvalue()


def test_looking_at_layers_changes_nothing(make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf) -> None:
    losses = []
    for every in (0, 1):
        train(make_config(f"train.watch_every={every}"), tmp_path / str(every), stream=io.StringIO())
        losses.append([row["loss"] for row in rows_of(tmp_path / str(every)) if row["kind"] in ("train", "val")])
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_compiled_blocks_can_be_looked_at(
    make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="eager"))
    looks = []
    for compiled in ("false", "true"):
        config = make_config(
            "train.watch_every=4", "train.eval_every=3", f"train.compile={compiled}", "train.tokens=1280"
        )
        train(config, tmp_path / compiled, stream=io.StringIO())
        rows = rows_of(tmp_path / compiled)
        looks.append([row["layers"] for row in rows if row["kind"] in ("layers", "val")])
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert not any("metrics.py" in reason or "Tensor.item" in reason for reason in breaks), breaks
    assert len(looks[0]) == 2 + 4
    for one, two in zip(*looks, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_tensorboard_holds_the_rows_and_a_resumed_run_replaces_what_it_repeats(
    make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, run = make_config("train.logs=[tensorboard]", "train.watch_every=10"), tmp_path / "run"
    train(config, run, stream=io.StringIO())
    last = run / "checkpoints" / "step_00000020"
    for path in sorted(last.iterdir()):
        path.unlink()
    last.rmdir()
    train(config, run, resume=True, stream=io.StringIO())
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for kind in ("train", "val"):
        rows = {row["step"]: row["loss"] for row in rows_of(run) if row["kind"] == kind}
        shown = {e.step: e.value for e in events.Scalars(f"{kind}/loss")}
        assert shown == pytest.approx(rows, rel=1e-6)
        assert len(events.Scalars(f"{kind}/loss")) == len(rows)
    assert len(events.Scalars("layers/0/state_rms")) == 2 + 2  # with each validation too


def test_tensorboard_that_cannot_be_written_is_named(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.raises(OSError, match=r"/run/tensorboard could not be written \(\[Errno 28\] No space"):
        train(make_config("train.logs=[tensorboard]"), tmp_path / "run", stream=io.StringIO())


def test_wandb_offline_keeps_the_run_in_its_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    train(make_config("train.logs=[wandb]", "train.wandb_offline=true"), run, stream=io.StringIO())
    name = (run / "wandb_id").read_text().strip()
    (written,) = (run / "wandb").glob(f"offline-run-*/run-{name}.wandb")
    assert written.stat().st_size > 1_000


def test_missing_package_is_told_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = importlib.import_module("gdn2.training.logs")
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.logs is 'wandb'; expected the package wandb .*'gdn2\[log\]'"):
        train(make_config("train.logs=[wandb]"), tmp_path / "run", stream=io.StringIO())
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"train\.logs is 'csv'; expected one of tensorboard, wandb"):
        make_config("train.logs=[csv]")


def test_only_finite_numbers_are_scalars() -> None:
    row = {"kind": "val", "step": 3, "loss": 1.0, "perplexity": math.inf, "bits_per_byte": None, "layers": [{"a": 2}]}
    assert scalars(row) == {"val/loss": 1.0, "layers/0/a": 2.0}
    assert json.dumps(scalars({"kind": "event", "step": 1, "event": "text"})) == "{}"
