import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gdn2.cli import main
from gdn2.config import ConfigError, RunConfig
from gdn2.info import describe
from gdn2.model import LanguageModel
from gdn2.training.plan import duration, peak_here, plan, share_of_one, show, size
from gdn2.training.throughput import mfu, peak_flops

MakeConfig = Callable[..., RunConfig]


def test_parameters_and_products_are_counted_as_torch_does(make_config: MakeConfig) -> None:
    """Every matrix product of a step, forward and backward; the rest of the FLOPs are the mixers' own counts."""
    config = make_config("model.cell=[mixer]")
    model, costs, T = LanguageModel(config.model), plan(config), config.data.seq_len
    assert costs.model.parameters == sum(p.numel() for p in model.parameters())
    tokens = torch.zeros(1, T, dtype=torch.int64)
    hidden, _ = model(tokens)
    with FlopCounterMode(display=False) as counter:
        hidden, _ = model(tokens)
        model.logits(hidden).sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    mixers = 3 * sum(mixer.flops(T) for mixer in model.mixers())
    assert costs.model.training_flops == pytest.approx(counted / T + mixers, rel=1e-12)
    assert costs.flops == costs.tokens * costs.model.training_flops == 2_560 * costs.model.training_flops
    assert (costs.steps, costs.tokens) == (20, 2_560)
    assert costs.checkpoint == 3 * 4 * costs.model.parameters + 4 * len(list(model.parameters()))


def test_text_names_costs_of_every_mode(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("train.recompute=full", "train.peak_flops=1e9")
    text = show(config, tmp_path / "a" / "run", rate=1_000.0)
    share = 100 * 1_000 * describe(config.model, config.data.seq_len).training_flops / 1e9
    assert "20, 2,560 tokens" in text
    assert "128 tokens: 2 x 2 sequences of 32" in text
    assert re.search(r"\n \*recompute=full .*activations .*\(mixer .*, attention .*, loss .*\), peak ", text)
    assert "0 h 0 min at 1,000 tokens/s" in text
    assert f"{share:.1f}% of train.peak_flops" in text
    assert "epochs" in text
    checkpoint = plan(config).checkpoint  # keep_last=2, and one that is written
    assert f"{size(checkpoint)} a checkpoint, {size(3 * checkpoint)} for 3; " in text
    shares = 4 * describe(config.model).parameters
    assert f"{size(3 * checkpoint + shares)} for 3; " in show(config, tmp_path / "run", devices=2)
    assert "is not prepared yet" in show(make_config("data.path=none"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_time_without_a_rate_is_that_of_an_assumed_share_of_the_peak(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = r"time +unknown without --rate TOKENS_PER_SECOND: neither train\.peak_flops nor the device tells a peak$"
    assert re.search(unknown, show(make_config(), tmp_path / "run"), re.M)
    config = make_config("train.peak_flops=1e3")
    seconds = plan(config).flops / (0.43 * 1e3)
    said = (
        " if each device reaches 43% of its peak, 1e+03 FLOPs/s, as an H100 did with gdn2-hybrid-1.3b, nothing recomp"
    )
    for devices in (1, 2):
        assert f"{duration(seconds / devices)}{said}" in show(config, tmp_path / "run", devices=devices)
    assert said not in show(config, tmp_path / "run", rate=5.0)
    assert duration(seconds) != duration(seconds / 2)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    on_gpu = [f"train.device={name}" for name in ("auto", "cuda", "cuda:1")]
    assert all(peak_here(make_config(device)) == 989e12 for device in on_gpu)
    for elsewhere in (["train.device=cpu"], ["train.device=cuda:2"], ["train.device=cuda", "train.precision=fp32"]):
        assert peak_here(make_config(*elsewhere)) is None


def test_command_writes_nothing_and_plans_for_a_gpu_that_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main_exits(["train", "--preset", "gdn2-hybrid-tiny", "--run", str(run), "--dry-run", "train.device=cuda:7"], 0)
    said, kept = (
        capsys.readouterr().out,
        "glibc's malloc keeps freed memory: processes were seen to grow by 1.2 to 1.8 times",
    )
    assert "1 GPU, bf16" in said
    assert kept not in said
    main_exits(["train", "--preset", "gdn2-hybrid-tiny", "--run", str(run), "--dry-run", "train.device=cpu"], 0)
    assert re.search(rf"\nmemory +\S+ MiB at most of 1 CPU, fp32\n +of tensors; {kept} that\n", capsys.readouterr().out)
    assert not run.exists()
    main_exits(["train", "--preset", "gdn2-hybrid-tiny", "--run", str(run), "--rate", "5"], 2)
    assert "--rate is 5.0; expected tokens per second above 0, together with --dry-run" in capsys.readouterr().err
    run.mkdir()
    (run / "note.txt").write_text("mine")
    main_exits(["train", "--preset", "gdn2-hybrid-tiny", "--run", str(run), "--dry-run"], 2)  # as the training would
    assert "is not empty; resume the run in it, or choose another folder" in capsys.readouterr().err


def main_exits(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == code


def test_sizes_times_and_shares() -> None:
    assert size(2**30) == "1.00 GiB"
    assert size(3 * 2**19) == "1.5 MiB"
    assert duration(100e9 / 45_000) == "25 d 17 h 17 min"
    assert duration(90 * 60) == "1 h 30 min"
    assert mfu(45_000, 8.675e9, 989e12) == pytest.approx(0.3947, rel=1e-3)
    assert mfu(45_000, 8.675e9, None) is peak_flops(torch.device("cpu")) is None


def test_devices_share_out_states_sequences_and_tokens(make_config: MakeConfig) -> None:
    size = (
        "model.cell=[mixer]",
        "model.num_layers=1",
        "train.batch_tokens=2048",
        "train.tokens=4096",
        "data.seq_len=64",
        "train.micro_batch=8",
    )
    config = make_config(*size)
    one, four = plan(config), plan(config, 4)
    a, b = one.memory["none"], four.memory["none"]
    assert (b.weights, b.gradients, b.optimizer) == (a.weights // 4, a.gradients // 4, a.optimizer // 4)
    assert share_of_one(config, 4).train.batch_tokens == 512
    assert b.activations == a.activations  # 8 sequences a micro-batch, in 4 of them as in 1
    assert four.checkpoint == one.checkpoint
    for axes in ("parallel.context=2", "parallel.context=4"):  # as FSDP shares them out over context ranks too
        own = plan(make_config(*size, axes), 4).memory["none"]
        assert (own.weights, own.gradients, own.optimizer) == (b.weights, b.gradients, b.optimizer)
    own = plan(make_config(*size, "parallel.replicas=2"), 4).memory["none"]
    assert (own.weights, own.optimizer) == (a.weights // 2, a.optimizer // 2)
    split_heads = make_config(*size, "model.num_heads=2", "parallel.tensor=2")
    whole, halves = plan(make_config(*size, "model.num_heads=2")).memory["none"], plan(split_heads, 2).memory["none"]
    around = sum(p.nbytes for n, p in LanguageModel(split_heads.model).named_parameters() if "blocks" not in n)
    assert 0.5 < (halves.weights - around) / (whole.weights - around) < 0.6  # norms and low ranks are whole everywhere
    quarters = plan(split_heads, 4).memory["none"]
    assert (quarters.weights, quarters.optimizer) == (halves.weights // 2, halves.optimizer // 2)
    assert plan(split_heads, 4).checkpoint == plan(make_config(*size, "model.num_heads=2")).checkpoint
    split = share_of_one(make_config(*size, "parallel.context=2", "parallel.shards=2"), 4)
    assert (split.data.seq_len, split.train.micro_batch, split.train.batch_tokens) == (32, 8, 512)
    with pytest.raises(
        ConfigError, match=r"train\.batch_tokens is 2048; expected a multiple of data\.seq_len, 64, for each of 3"
    ):
        plan(config, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.name=muon"], "optim.name is 'muon'; expected adamw with several processes"),
        (["parallel.context=2", "train.compile=true"], "train.compile is True; expected false with parallel.context 2"),
        (["parallel.tensor=2", "train.sample_every=1"], "train.sample_every is 1; expected 0 with parallel.tensor 2"),
        (["model.mixer=mamba2", "parallel.tensor=2"], "parallel.tensor is 2; expected 1 with the mixer mamba2"),
    ],
)
def test_what_training_would_refuse_is_not_planned(make_config: MakeConfig, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan(make_config(*settings), 2)
