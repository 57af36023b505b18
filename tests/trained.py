"""A run without its display, and the tensors that it left."""

import io
from pathlib import Path

import torch
from safetensors.torch import load_file

from gdn2.config import RunConfig
from gdn2.training import Outcome, train


def quiet(config: RunConfig, run_dir: Path, resume: bool = False) -> Outcome:
    return train(config, run_dir, resume, stream=io.StringIO())


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    return {
        f"{name} {key}": value
        for name in ("model", "optimizer")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }
