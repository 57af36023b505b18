"""Writes and reads the checkpoints of a run, whatever the number of processes now and then."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdn2.config import RunConfig
from gdn2.data.tokenizer import Tokenizer
from gdn2.training import checkpoint
from gdn2.training.distributed import Ranks


class Saver:
    """The checkpoints of one run. All of its processes call each method together."""

    def __init__(self, run_dir: Path, config: RunConfig, tokenizer: Tokenizer, ranks: Ranks) -> None:
        self._place = run_dir, config, tokenizer
        self._sharded = None
        if ranks.mesh is not None:
            from gdn2.training.sharded_checkpoint import ShardedCheckpoints

            self._sharded = ShardedCheckpoints(*self._place, ranks)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, trainer: dict[str, Any]) -> None:
        """Write a checkpoint. CheckpointError where it, or the one before in the background, cannot be written."""
        if self._sharded is not None:
            self._sharded.save(step, model, optimizer, trainer)
        else:
            run_dir, config, tokenizer = self._place
            checkpoint.save(run_dir, step, model, optimizer, trainer, config, tokenizer)

    def load(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put a verified checkpoint into a model and an optimizer built from the same configuration."""
        if self._sharded is None and (folder / "optimizer.safetensors").is_file():
            checkpoint.load(folder, model, optimizer)
        else:
            from gdn2.training import sharded_checkpoint

            sharded_checkpoint.load(folder, model, optimizer)

    def wait(self) -> None:
        """Until what is written in the background is on disk. CheckpointError where it could not be written."""
        if self._sharded is not None:
            self._sharded.wait()
