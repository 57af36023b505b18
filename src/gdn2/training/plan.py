"""`gdn2 train --dry-run`: what a run will cost, before anything is allocated."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from gdn2.config import RECOMPUTE, ConfigError, RunConfig, require
from gdn2.data import Shards
from gdn2.info import ModelInfo, describe
from gdn2.training.memory import Memory, estimate, on_meta
from gdn2.training.optim import state_bytes
from gdn2.training.parallel import check_parallel
from gdn2.training.throughput import mfu, peak_flops

GIB = 2**30
ASSUMED_SHARE = 0.43  # of a GPU's peak, where no rate is given: see docs/training.md, "Speed"

KEPT_BY_GLIBC = "of tensors; glibc's malloc keeps freed memory: processes were seen to grow by 1.2 to 1.8 times that"


@dataclass(frozen=True)
class Plan:
    """A run's cost.

    model: parameters and FLOPs, of sequences of `data.seq_len` tokens.
    steps, tokens: of the whole run.
    flops: of all tokens together; recomputed activations are not counted.
    memory: bytes on one device, by `train.recompute`.
    checkpoint: bytes of one.
    """

    model: ModelInfo
    steps: int
    tokens: int
    flops: float
    memory: dict[str, Memory]
    checkpoint: int


def plan(config: RunConfig, devices: int = 1) -> Plan:
    """Count and estimate, memory for one of `devices`; "cuda" need not be there: it is planned for all the same.

    ConfigError where the configuration does not fit so many.
    """
    check_parallel(config, devices)
    on_gpu, precision = target(config)
    model = describe(config.model, config.data.seq_len)
    tokens = config.steps * config.train.batch_tokens
    own = share_of_one(config, devices)
    whole = {mode: estimate(own, mode, on_gpu, precision) for mode in RECOMPUTE}
    empty = on_meta(config.model)
    checkpoint = sum(p.nbytes for p in empty.parameters()) + state_bytes(empty, config.optim)
    memory = {mode: sharded(found, config, devices, precision) for mode, found in whole.items()}
    return Plan(model, config.steps, tokens, tokens * model.training_flops, memory, checkpoint)


def share_of_one(config: RunConfig, devices: int) -> RunConfig:
    """A configuration whose micro-batches and batch are those of one of `devices`."""
    replicas, shards, context, _ = config.parallel.sizes(devices)
    length, train = config.data.seq_len, config.train
    readers = replicas * shards
    require(length % context == 0, "data.seq_len", length, f"a multiple of parallel.context, {context}")
    require(
        train.batch_tokens % (length * readers) == 0, "train.batch_tokens", train.batch_tokens,
        f"a multiple of data.seq_len, {length}, for each of {readers} ranks",
    )  # fmt: skip
    sequences = train.batch_tokens // length // readers
    micro_batch = next(n for n in range(min(train.micro_batch, sequences), 0, -1) if sequences % n == 0)
    tokens = sequences * length // context
    return replace(
        config,
        data=replace(config.data, seq_len=length // context),
        optim=replace(config.optim, warmup_tokens=0, decay_tokens=0),
        train=replace(train, tokens=tokens, batch_tokens=tokens, micro_batch=micro_batch),
    )


def sharded(found: Memory, config: RunConfig, devices: int, precision: str) -> Memory:
    """Weights, gradients and optimizer shared out over all ranks but replicas and those that `estimate` knows of, and
    what is gathered for use: embedding, head and two blocks with their gradients."""
    _, shards, context, _ = config.parallel.sizes(devices)
    ranks = shards * context
    if ranks == 1:
        return found
    largest = max(part.gradients for kind, part in found.parts.items() if kind != "loss")
    gathered = found.parts["loss"].gradients + 2 * (largest // (2 if precision == "bf16" else 1)) + 2 * largest
    weights, gradients, optimizer = (n // ranks for n in (found.weights, found.gradients, found.optimizer))
    saved = found.weights + found.gradients + found.optimizer - weights - gradients - optimizer
    peak = found.peak - saved + gathered
    return replace(found, weights=weights, gradients=gradients, optimizer=optimizer, peak=peak)


def target(config: RunConfig) -> tuple[bool, str]:
    """Whether the run is for a GPU, and its precision."""
    import torch

    device, precision = config.train.device, config.train.precision
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return on_gpu, ("bf16" if on_gpu else "fp32") if precision == "auto" else precision


def show(config: RunConfig, run_dir: Path, rate: float | None = None, devices: int = 1) -> str:
    """The plan as text. `rate`, tokens per second of all devices together, gives the time; else an assumed one."""
    costs, train = plan(config, devices), config.train
    now = costs.memory[train.recompute]
    on_gpu, precision = target(config)
    one = share_of_one(config, devices)
    parts = one.train.batch_tokens // (one.train.micro_batch * one.data.seq_len)
    each = f"{parts:,} x {one.train.micro_batch} sequences of {one.data.seq_len:,}"
    where = f"{devices} {'GPU' if on_gpu else 'CPU'}{'s' * (devices > 1)}"
    lines = [
        ("model", f"{costs.model.parameters:,} parameters, {costs.model.block_parameters:,} in the blocks"),
        ("arithmetic", f"{costs.model.training_flops:,.0f} FLOPs per token, {costs.flops:.3e} in all"),
        ("batch", f"{train.batch_tokens:,} tokens: {each}{' on each device' * (devices > 1)}"),
        ("steps", f"{costs.steps:,}, {costs.tokens:,} tokens"),
        ("data", data_line(config, costs.tokens)),
        ("memory", f"{size(now.peak)} at most{' on each' * (devices > 1)} of {where}, {precision}"),
        *([] if on_gpu else [("", KEPT_BY_GLIBC)]),
        ("  weights", f"{size(now.weights)}, and as much for gradients"),
        ("  optimizer", size(now.optimizer)),
    ]
    for mode, memory in costs.memory.items():
        each = ", ".join(f"{kind} {size(held.kept)}" for kind, held in memory.parts.items())
        mark = "*" if mode == train.recompute else " "
        lines.append(
            (f" {mark}recompute={mode}", f"activations {size(memory.activations)} ({each}), peak {size(memory.peak)}")
        )
    milestones = 0 if not train.keep_every else costs.steps // train.keep_every
    kept = min(train.keep_last + 1 + milestones, max(1, costs.steps))  # one more while it is written
    # Of several processes the weights lie twice for a moment: in shares, and joined.
    room = kept * costs.checkpoint + (costs.model.weight_bytes["float32"] if devices > 1 else 0)
    free = shutil.disk_usage(next(p for p in run_dir.absolute().parents if p.is_dir())).free
    lines.append(
        (
            "disk",
            f"{size(costs.checkpoint)} a checkpoint, {size(room)} for {kept}; {size(free)} free",
        )
    )
    lines.append(("time", time_line(config, costs, rate, devices)))
    return "\n".join(f"{name:<22}{text}" for name, text in lines)


def time_line(config: RunConfig, costs: Plan, rate: float | None, devices: int) -> str:
    """The time at a given rate, or at an assumed share of a known peak."""
    peak = config.train.peak_flops
    if rate is not None:
        share = mfu(rate / devices, costs.model.training_flops, peak)
        of_peak = "" if share is None else f", {share:.1%} of train.peak_flops"
        return f"{duration(costs.tokens / rate)} at {rate:,.0f} tokens/s{of_peak}"
    peak = peak or peak_here(config)
    if peak is None:
        return "unknown without --rate TOKENS_PER_SECOND: neither train.peak_flops nor the device tells a peak"
    seconds = costs.flops / (ASSUMED_SHARE * peak * devices)
    return (
        f"{duration(seconds)} if each device reaches {ASSUMED_SHARE:.0%} of its peak, {peak:.3g} FLOPs/s, as an H100 "
        "did with gdn2-hybrid-1.3b, nothing recomputed; small models reach less, --rate tells better"
    )


def peak_here(config: RunConfig) -> float | None:
    """What the maker states of the GPU that the run is for, where that is there and computes in bf16."""
    import torch

    on_gpu, precision = target(config)
    device = torch.device("cuda" if config.train.device == "auto" else config.train.device)
    there = on_gpu and torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return peak_flops(device) if there and precision == "bf16" else None


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
