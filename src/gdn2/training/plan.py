"""`gdn2 train --dry-run`: what a run will cost, before anything is allocated."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from gdn2.config import RECOMPUTE, ConfigError, RunConfig
from gdn2.data import Shards
from gdn2.info import ModelInfo, describe
from gdn2.training.memory import Memory, estimate

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A run's cost.

    model: parameters and FLOPs, of sequences of `data.seq_len` tokens.
    steps, tokens: of the whole run.
    flops: of all tokens together; recomputed activations are not counted.
    memory: bytes on the device, by `train.recompute`.
    checkpoint: bytes of one.
    """

    model: ModelInfo
    steps: int
    tokens: int
    flops: float
    memory: dict[str, Memory]
    checkpoint: int


def plan(config: RunConfig) -> Plan:
    """Count and estimate; "cuda" need not be there: it is planned for all the same."""
    on_gpu, precision = target(config)
    model = describe(config.model, config.data.seq_len)
    tokens = config.steps * config.train.batch_tokens
    memory = {mode: estimate(config, mode, on_gpu, precision) for mode in RECOMPUTE}
    now = memory[config.train.recompute]
    return Plan(model, config.steps, tokens, tokens * model.training_flops, memory, now.weights + now.optimizer)


def target(config: RunConfig) -> tuple[bool, str]:
    """Whether the run is for a GPU, and its precision."""
    import torch

    device, precision = config.train.device, config.train.precision
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return on_gpu, ("bf16" if on_gpu else "fp32") if precision == "auto" else precision


def show(config: RunConfig, run_dir: Path, rate: float | None = None, peak: float | None = None) -> str:
    """The plan as text. `rate` in tokens per second gives the time, `peak` in FLOPs per second the share of it."""
    costs, train = plan(config), config.train
    now = costs.memory[train.recompute]
    on_gpu, precision = target(config)
    sequences = train.micro_batch * config.data.seq_len
    parts = train.batch_tokens // sequences
    lines = [
        ("model", f"{costs.model.parameters:,} parameters, {costs.model.block_parameters:,} in the blocks"),
        ("arithmetic", f"{costs.model.training_flops:,.0f} FLOPs per token, {costs.flops:.3e} in all"),
        (
            "batch",
            f"{train.batch_tokens:,} tokens: {parts:,} x {train.micro_batch} sequences of {config.data.seq_len:,}",
        ),
        ("steps", f"{costs.steps:,}, {costs.tokens:,} tokens"),
        ("data", data_line(config, costs.tokens)),
        ("memory", f"{size(now.peak)} at most, {'GPU' if on_gpu else 'CPU'}, {precision}"),
        ("  weights", f"{size(now.weights)}, and as much for gradients"),
        ("  optimizer", size(now.optimizer)),
    ]
    for mode, memory in costs.memory.items():
        each = ", ".join(f"{kind} {size(held.kept)}" for kind, held in memory.parts.items())
        mark = "*" if mode == train.recompute else " "
        lines.append(
            (f" {mark}recompute={mode}", f"activations {size(memory.activations)} ({each}), peak {size(memory.peak)}")
        )
    kept = train.keep_last + 1
    free = shutil.disk_usage(next(p for p in run_dir.absolute().parents if p.is_dir())).free
    lines.append(
        (
            "disk",
            f"{size(costs.checkpoint)} a checkpoint, {size(kept * costs.checkpoint)} for {kept}; {size(free)} free",
        )
    )
    if rate is None:
        lines.append(("time", "unknown; --rate TOKENS_PER_SECOND tells"))
    else:
        share = "" if peak is None else f", {100 * rate * costs.model.training_flops / peak:.1f} % of the device's peak"
        lines.append(("time", f"{duration(costs.tokens / rate)} at {rate:,.0f} tokens/s{share}"))
    return "\n".join(f"{name:<22}{text}" for name, text in lines)


def data_line(config: RunConfig, tokens: int) -> str:
    """How often the run reads its data; says so where that is not prepared yet."""
    if not (Path(config.data.path) / "meta.json").is_file():
        return f"{config.data.path} is not prepared yet"
    meta = Shards(config.data.path).meta
    if meta.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}; expected at least the {meta.vocab_size} of the data's "
            f"tokenizer {meta.tokenizer!r}"
        )
    return f"{meta.train.tokens:,} tokens in {config.data.path}: {tokens / meta.train.tokens:,.2f} epochs"


def size(n: float) -> str:
    return f"{n / GIB:,.2f} GiB" if n >= GIB else f"{n / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    days, rest = divmod(minutes, 24 * 60)
    return f"{days} d {rest // 60} h {rest % 60} min" if days else f"{rest // 60} h {rest % 60} min"
