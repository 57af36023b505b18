"""Rows of metrics to TensorBoard and Weights & Biases, besides metrics.jsonl."""

import importlib.util
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from gdn2.config import RunConfig, require, to_dict
from gdn2.data.disk import writing

Row = dict[str, Any]


class Log(Protocol):
    def append(self, row: Row) -> None:
        """OSError, which names the log, where it cannot be written."""

    def close(self) -> None: ...


def check_logs(config: RunConfig) -> None:
    """ConfigError where a package that `train.logs` needs is not installed."""
    for name in config.train.logs:
        require(
            importlib.util.find_spec(name) is not None, "train.logs", name,
            f"the package {name} to be installed: pip install 'gdn2[log]'",
        )  # fmt: skip


@contextmanager
def open_logs(config: RunConfig, run_dir: Path, step: int) -> Iterator[list[Log]]:
    """The logs that `train.logs` names, of a run with `step` steps done; closed on leaving."""
    kinds: dict[str, Callable[[RunConfig, Path, int], Log]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    logs: list[Log] = []
    try:
        for name in config.train.logs:
            logs.append(kinds[name](config, run_dir, step))
        yield logs
    finally:
        for log in logs:
            log.close()


def scalars(row: Row) -> dict[str, float]:
    """The finite numbers of a row by a name: "train/loss", and "layers/3/state_rms" for a list of layers."""
    found = {f"{row['kind']}/{key}": value for key, value in row.items() if key not in ("kind", "step", "layers")}
    for i, layer in enumerate(row.get("layers", ())):
        found |= {f"layers/{i}/{key}": value for key, value in layer.items()}
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def text(row: Row) -> str | None:
    """What an event or a sample says."""
    if row["kind"] == "sample":
        return f"{row['prompt']}[...]{row['text']}"
    return row.get("event")


class TensorBoard:
    """RUN/tensorboard; what a resumed run writes again replaces what was there."""

    def __init__(self, config: RunConfig, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / "tensorboard"
        with writing(self._path):
            self._writer = SummaryWriter(self._path, purge_step=step + 1 if step else None)

    def append(self, row: Row) -> None:
        with writing(self._path):
            for name, value in scalars(row).items():
                self._writer.add_scalar(name, value, row["step"])
            said = text(row)
            if said is not None:
                self._writer.add_text(row["kind"], said, row["step"])

    def close(self) -> None:
        with writing(self._path):
            self._writer.close()


class WeightsAndBiases:
    """A run of `train.wandb_project`, or with `train.wandb_offline` RUN/wandb, which `wandb sync` sends later.

    A resumed run goes on under the same id; steps that it does again are not sent again.
    """

    def __init__(self, config: RunConfig, run_dir: Path, step: int) -> None:
        import wandb

        note = run_dir / "wandb_id"
        if not note.is_file():
            with writing(note, note):
                note.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        self._run = wandb.init(
            project=config.train.wandb_project,
            name=run_dir.name,
            id=note.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=run_dir,
            config=to_dict(config),
            mode="offline" if config.train.wandb_offline else "online",
        )

    def append(self, row: Row) -> None:
        values: dict[str, Any] = dict(scalars(row))
        said = text(row)
        if said is not None:
            values[row["kind"]] = said
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        self._run.finish()
