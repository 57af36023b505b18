import importlib
import io
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import quiet, tensors

from gdn2.config import ConfigError, RunConfig, read_config
from gdn2.data import Shards, load_tokenizer, prepare
from gdn2.generate import generate
from gdn2.model import LanguageModel
from gdn2.training import CheckpointError, checkpoint, train
from gdn2.training.device import resolve_device
from gdn2.training.opening import check_same, rates

module = importlib.import_module("gdn2.training.train")  # the package's name for it is the function
MakeConfig = Callable[..., RunConfig]
RowsOf = Callable[[Path], list[dict[str, Any]]]

CLOCK = {"elapsed", "tokens_per_second", "mfu", "memory"}


def reproducible(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that a resumed run must repeat, without what a clock gave."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows if row["kind"] != "event"]


def assert_same_run(a: Path, b: Path, step: int, rows_of: RowsOf) -> None:
    first, second = tensors(a, step), tensors(b, step)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert reproducible(rows_of(a)) == reproducible(rows_of(b))


@pytest.mark.parametrize(("packed", "name"), [("false", "adamw"), ("true", "adamw"), ("true", "muon")])
def test_resumed_run_is_bit_identical(
    make_config: MakeConfig, tmp_path: Path, packed: str, name: str, rows_of: RowsOf
) -> None:
    config = make_config(f"data.packed={packed}", f"optim.name={name}")
    quiet(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000020")
    outcome = quiet(config, tmp_path / "parts", resume=True)
    assert outcome.step == config.steps == 20
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 20, rows_of)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resume_goes_on_exactly(
    make_config: MakeConfig,
    tmp_path: Path,
    number: signal.Signals,
    rows_of: RowsOf,
    on_batch: Callable[[int, Callable[[], None]], None],
) -> None:
    config = make_config()
    quiet(config, tmp_path / "whole")
    handlers = signal.getsignal(number)
    on_batch(2 * 7, lambda: os.kill(os.getpid(), number))  # two micro-batches a step: within the seventh
    out = io.StringIO()
    outcome = train(config, tmp_path / "parts", stream=out)
    assert (outcome.step, outcome.tokens, outcome.interrupted) == (7, 7 * 128, number.name)
    assert (
        f"stopped by {number.name}, saved; go on with: gdn2 train --run {tmp_path / 'parts'} --resume" in out.getvalue()
    )
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "parts")] == ["step_00000007"]
    assert signal.getsignal(number) == handlers
    assert quiet(config, tmp_path / "parts", resume=True).interrupted is None
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 20, rows_of)


def test_second_signal_ends_at_once(
    make_config: MakeConfig, tmp_path: Path, on_batch: Callable[[int, Callable[[], None]], None]
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    on_batch(3, twice)
    with pytest.raises(KeyboardInterrupt):
        quiet(make_config(), tmp_path / "run")


def test_rows_written_after_the_checkpoint_are_replaced(
    make_config: MakeConfig,
    tmp_path: Path,
    rows_of: RowsOf,
    on_batch: Callable[[int, Callable[[], None]], None],
) -> None:
    """A crash at step 17 leaves rows up to 15 and half a line, but a checkpoint of step 10."""
    config = make_config()
    quiet(config, tmp_path / "whole")

    def crash() -> None:
        raise MemoryError

    on_batch(2 * 17, crash)
    with pytest.raises(MemoryError):
        quiet(config, tmp_path / "parts")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    quiet(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 20, rows_of)


def test_loss_falls_and_rows_are_complete(make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf) -> None:
    config = make_config("train.tokens=7680", "train.sample_every=30", "train.sample_tokens=8")
    outcome = quiet(config, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    training = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in training] == list(range(3, 61, 3))
    assert training[-1]["loss"] < training[0]["loss"] - 1  # 257 classes start near 5.5 nats; these words need about 1
    assert set(training[0]) == {
        "kind", "step", "tokens", "elapsed", "loss", "perplexity", "bits_per_byte", "lr", "grad_norm",
        "tokens_per_second", "mfu", "memory", "bad_steps",
    }  # fmt: skip
    val = [row for row in rows if row["kind"] == "val"]
    assert [row["step"] for row in val] == [10, 20, 30, 40, 50, 60]
    assert outcome.val == val[-1]
    assert val[-1]["perplexity"] == pytest.approx(math.exp(val[-1]["loss"]))
    assert len(val[-1]["layers"]) == 1  # one mixer, one attention block
    samples = [row for row in rows if row["kind"] == "sample"]
    assert [row["step"] for row in samples] == [30, 60]
    tokenizer = load_tokenizer("bytes")
    model = LanguageModel.from_checkpoint(tmp_path / "run")
    prompt = Shards(config.data.path).split("val").tokens[: module.PROMPT_TOKENS].tolist()
    steps = generate(model, [prompt], 8, temperature=0.8, seed=config.seed, stop_tokens=(256,))
    text = tokenizer.decode([token for (token,) in steps if token is not None])
    assert (samples[-1]["prompt"], samples[-1]["text"]) == (tokenizer.decode(prompt), text)
    assert text
    assert training[-1]["lr"] == pytest.approx(config.optim.lr * config.optim.min_lr_ratio)


def test_accumulation_matches_one_large_batch(make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf) -> None:
    """Packed, micro-batches hold different numbers of targets: only a mean over all targets agrees."""
    runs = []
    for size in (1, 4):
        config = make_config("data.packed=true", f"train.micro_batch={size}", "train.tokens=640", "train.log_every=1")
        quiet(config, tmp_path / str(size))
        runs.append(tensors(tmp_path / str(size), 5))
    losses = [[r["loss"] for r in rows_of(tmp_path / d) if r["kind"] == "train"] for d in ("1", "4")]
    # float32 sums in another order: 5 steps of rounding, each about 1e-7 relative
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    moments = [{k: v for k, v in run.items() if "exp_avg." in k} for run in runs]
    for key, value in moments[0].items():  # a gradient of a wrong scale shows here; AdamW's own steps hide it
        torch.testing.assert_close(value, moments[1][key], rtol=1e-3, atol=1e-5 * float(value.abs().max()) + 1e-9)
    for key in (k for k in runs[0] if k.startswith("model")):
        # where a gradient is all rounding, AdamW's step may take either sign: 5 of at most lr
        torch.testing.assert_close(runs[0][key], runs[1][key], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    ["train.eval_every=7", "train.log_every=2", "train.keep_last=1", "train.device=auto", "train.micro_batch=1"],
)
def test_resume_may_change_what_is_looked_at_and_held_at_once(
    make_config: MakeConfig, tmp_path: Path, change: str
) -> None:
    config = make_config()
    quiet(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000020")
    assert quiet(make_config(change), tmp_path / "run", resume=True).step == 20
    assert read_config(tmp_path / "run") == make_config(change)


def test_resume_with_another_configuration_is_refused_with_the_difference(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    quiet(make_config(), tmp_path / "run")
    before = sorted(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    with pytest.raises(ConfigError, match=r"\n  optim\.lr: was 0\.01, is 0\.002\n  seed: was 7, is 8$"):
        quiet(make_config("optim.lr=2e-3", "seed=8"), tmp_path / "run", resume=True)
    assert sorted(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()) == before


def test_length_may_change_only_while_past_rates_stay(make_config: MakeConfig) -> None:
    def may(step: int, *new: str, old: tuple[str, ...]) -> bool:
        try:
            check_same(make_config(*old), make_config(*old, *new), step)
        except ConfigError:
            return False
        return True

    longer, shorter = "train.tokens=5120", "train.tokens=1280"  # 40 and 10 steps instead of 20
    constant, wsd, cosine = ("optim.schedule=constant",), ("optim.schedule=wsd", "optim.decay_tokens=640"), ()
    assert may(20, longer, old=constant)
    assert may(5, shorter, old=constant)
    assert not may(11, shorter, old=constant)  # it is past its new end
    assert may(15, longer, old=wsd)
    assert not may(16, longer, old=wsd)  # the decay has begun
    assert not may(3, longer, old=cosine)
    assert may(2, longer, old=cosine)  # still warming up


def test_longer_constant_run_is_the_run_it_would_have_been(make_config: MakeConfig, tmp_path: Path) -> None:
    constant = "optim.schedule=constant"
    quiet(make_config(constant), tmp_path / "long")
    quiet(make_config(constant, "train.tokens=1280"), tmp_path / "grown")
    quiet(make_config(constant), tmp_path / "grown", resume=True)
    first, second = tensors(tmp_path / "long", 20), tensors(tmp_path / "grown", 20)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_other_data_is_refused_and_moved_data_is_not(make_config: MakeConfig, tmp_path: Path, shards: Path) -> None:
    quiet(make_config(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000020")
    prepare(tmp_path / "other", [shards.parent / "a.jsonl"], val_share=0.3)
    with pytest.raises(ConfigError, match="train_sha256 was"):
        quiet(make_config(f"data.path={tmp_path / 'other'}"), tmp_path / "run", resume=True)
    shutil.copytree(shards, tmp_path / "moved")
    assert quiet(make_config(f"data.path={tmp_path / 'moved'}"), tmp_path / "run", resume=True).step == 20


def test_other_precision_is_refused(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    quiet(config, tmp_path / "run")
    device, autocast, _ = resolve_device(config)
    monkeypatch.setattr(module, "resolve_device", lambda config: (device, autocast, "bf16"))
    with pytest.raises(ConfigError, match="precision was fp32, is bf16"):
        quiet(config, tmp_path / "run", resume=True)


def test_finished_run_resumes_to_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    quiet(make_config(), tmp_path / "run")
    before = tensors(tmp_path / "run", 20)
    outcome = quiet(make_config(), tmp_path / "run", resume=True)
    assert (outcome.step, outcome.interrupted, outcome.val) == (20, None, None)
    assert all(torch.equal(v, before[k]) for k, v in tensors(tmp_path / "run", 20).items())


def test_folder_in_use_is_refused_untouched(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; resume the run in it, or choose another folder"):
        quiet(make_config(), tmp_path)
    with pytest.raises(ValueError, match="is not empty"):
        quiet(make_config(), tmp_path / "notes.txt")
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("resume", [False, True])
def test_run_that_ended_before_its_first_checkpoint_says_what_to_do(
    make_config: MakeConfig, tmp_path: Path, resume: bool, on_batch: Callable[[int, Callable[[], None]], None]
) -> None:
    def crash() -> None:
        raise MemoryError

    on_batch(3, crash)
    with pytest.raises(MemoryError):
        quiet(make_config(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="ended before its first checkpoint; remove that folder and start again"):
        quiet(make_config(), tmp_path / "run", resume)


def test_nothing_to_resume_is_said(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint to resume from; start without --resume"):
        quiet(make_config(), tmp_path / "run", resume=True)
    assert os.listdir(tmp_path) == []


def test_damaged_checkpoint_stops_the_resume_and_removing_it_helps(make_config: MakeConfig, tmp_path: Path) -> None:
    quiet(make_config(), tmp_path / "run")
    older, newest = checkpoint.checkpoints(tmp_path / "run")
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it does not match.*step_00000010"):
        quiet(make_config(), tmp_path / "run", resume=True)
    shutil.rmtree(newest)
    assert quiet(make_config(), tmp_path / "run", resume=True).step == 20
    assert older.is_dir()


def test_bad_input_is_refused_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, altered = tmp_path / "run", shutil.copytree(shards, tmp_path / "altered")
    data = bytearray((altered / "train.bin").read_bytes())
    data[1] = 255  # token 65,000 or so, of 257
    (altered / "train.bin").write_bytes(data)
    for overrides, message in [
        (["model.vocab_size=256"], r"model\.vocab_size is 256; expected at least the 257 of the data's tokenizer"),
        (["data.path=nowhere"], "'nowhere' is no folder of token shards"),
        (["data.seq_len=8192", "train.micro_batch=1", "train.batch_tokens=8192"], r"val\.bin' has \d+ tokens; one win"),
        ([f"data.path={altered}"], r"train\.bin' does not match its checksum"),
        (["train.device=cuda:63"], "train.device is 'cuda:63'; expected a device of this machine"),
    ]:
        with pytest.raises(ValueError, match=message):
            quiet(make_config(*overrides), run)
        assert not run.exists()


def test_bf16_autocast_keeps_float32_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    quiet(make_config("train.precision=bf16", "train.tokens=640"), tmp_path / "run")
    values = tensors(tmp_path / "run", 5)
    assert {v.dtype for v in values.values()} == {torch.float32}
    assert all(torch.isfinite(v).all() for v in values.values())


def test_clip_zero_reports_the_norm_and_does_not_clip(
    make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, plain = [], torch.optim.AdamW.step

    def update(self: torch.optim.AdamW) -> None:
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]])))
        plain(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    quiet(make_config("optim.clip=0", "train.tokens=384", "train.log_every=1"), tmp_path / "run")
    norms = [r["grad_norm"] for r in rows_of(tmp_path / "run") if r["kind"] == "train"]
    assert seen == pytest.approx(norms, rel=1e-5)  # the same sums in float32 in another order
    assert len(norms) == 3
    assert min(norms) > 0


def test_clipped_gradients_and_the_schedule_reach_the_optimizer(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, seen, plain = [], [], torch.optim.AdamW.step

    def update(self: torch.optim.AdamW) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        seen.append({group["lr"] for group in self.param_groups})
        plain(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    config = make_config("optim.clip=0.01")
    quiet(config, tmp_path / "run")
    assert norms == pytest.approx([0.01] * 20, rel=1e-4)  # every gradient of these losses is larger; float32 sums
    assert seen == [{rate} for rate in rates(config, 20)]
    assert len(set(rates(config, 20))) > 10


def test_eval_and_checkpoint_only_at_the_end_when_zero(
    make_config: MakeConfig, tmp_path: Path, rows_of: RowsOf
) -> None:
    quiet(make_config("train.eval_every=0", "train.checkpoint_every=0"), tmp_path / "run")
    assert [row["step"] for row in rows_of(tmp_path / "run") if row["kind"] == "val"] == [20]
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step_00000020"]


def test_compiled_blocks_are_asked_for(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    config = make_config("train.tokens=384")
    quiet(replace(config, train=replace(config.train, compile=True)), tmp_path / "run")
    assert len(compiled) == config.model.num_layers


def test_muon_is_refused_with_several_processes(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"optim\.name is 'muon'; expected adamw with several processes"):
        quiet(make_config("optim.name=muon"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
