"""What a run starts from: an unused folder, or the newest checkpoint of the same run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdn2.config import ConfigError, RunConfig, read_config, to_dict
from gdn2.data.lock import NAME as LOCK
from gdn2.training import checkpoint
from gdn2.training.checkpoint import CheckpointError
from gdn2.training.optim import learning_rate

# What a resumed run may change: what is looked at, where the data lies and where and in what portions the arithmetic
# runs, never the mathematics. SCHEDULE may change too while the learning rates of the past stay the same (see
# `check_same`).
FREE = {f"train.{name}" for name in (
    "eval_every", "eval_tokens", "sample_every", "sample_tokens", "log_every", "checkpoint_every", "keep_last",
    "keep_every", "background_checkpoints", "max_bad_steps", "device", "compile", "recompute", "micro_batch",
    "watch_every", "logs", "wandb_project", "wandb_offline", "peak_flops",
)} | {f"parallel.{key}" for key in ("shards", "replicas", "tensor", "context", "timeout")} | {"data.path"}  # fmt: skip
SCHEDULE = {"train.tokens", "optim.decay_tokens"}


def open_run(
    config: RunConfig, run_dir: Path, resume: bool, source: dict[str, str], contents: bool = True
) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to start from, verified, and its trainer values; None and nothing for a new run.

    Without `contents` its files are not read: another process of this machine does that. Touches nothing. ValueError
    for a new run in a folder that is not empty; CheckpointError when there is nothing to resume or it is damaged;
    ConfigError when the configuration differs in more than it may.
    """
    found = checkpoint.checkpoints(run_dir)
    if not found and (run_dir / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"the run in {str(run_dir)!r} ended before its first checkpoint; remove that folder and start again "
            "without --resume, perhaps with a smaller train.checkpoint_every"
        )
    if not resume:
        check_unused(run_dir)
        return None, {}
    if not found:
        raise CheckpointError(f"{str(run_dir)!r} holds no checkpoint to resume from; start without --resume")
    trainer = checkpoint.verify(found[-1], contents=contents)
    check_same(read_config(found[-1]), config, trainer["step"])
    for key, now in source.items():
        if trainer[key] != now:
            raise ConfigError(f"cannot resume {str(run_dir)!r}: {key} was {trainer[key]}, is {now}")
    return found[-1], trainer


def check_unused(run_dir: Path) -> None:
    """ValueError where a new run cannot begin, since something is there."""
    if run_dir.exists() and (not run_dir.is_dir() or any(p.name != LOCK for p in run_dir.iterdir())):
        raise ValueError(f"{str(run_dir)!r} is not empty; resume the run in it, or choose another folder")


def check_same(old: RunConfig, new: RunConfig, step: int) -> None:
    """ConfigError when a run with `step` steps done under `old` would not be the same run under `new`.

    What is in FREE may change. The length of the run and of its decay may too, as long as every step done so far
    would have had the same learning rate: with "constant" always, with "wsd" before the decay, with "cosine" never
    after the warm-up.
    """
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    changed = [key for key in before if before[key] != after[key] and key not in FREE]
    if changed and set(changed) <= SCHEDULE and step <= new.steps and rates(old, step) == rates(new, step):
        return
    if changed:
        lines = "".join(f"\n  {key}: was {before[key]!r}, is {after[key]!r}" for key in changed)
        raise ConfigError(f"cannot resume with another configuration; put these back or start a new run:{lines}")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def rates(config: RunConfig, steps: int) -> Sequence[float]:
    """The learning rates of the first `steps` steps."""
    batch, total = config.train.batch_tokens, config.steps * config.train.batch_tokens
    return [learning_rate(config.optim, step * batch, total) for step in range(1, steps + 1)]
