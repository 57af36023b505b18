"""Checkpoints: whole or absent, checked before use, nothing pickled.

    RUN/checkpoints/step_00000200/
        model.safetensors       every parameter
        optimizer.safetensors   AdamW's state, "<what>.<parameter name>"
        optimizer/              instead of it, where several processes trained: a safetensors file of each one's share
        trainer.json            step, counters, data position, random state, versions, SHA-256 of the other files
        config.yaml             the RunConfig
        tokenizer.json          what `load_tokenizer` needs

A checkpoint is written into a hidden folder, flushed to disk and renamed, so that a kill or a full disk leaves the
older ones as they were; those are deleted only afterwards.
"""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gdn2.config import RunConfig, write_config
from gdn2.data.disk import share_alike
from gdn2.data.shards import flush, sha256_of
from gdn2.data.tokenizer import Tokenizer


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or is damaged or missing."""


def checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = (p for p in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name))
    return sorted(found, key=lambda p: int(p.name[5:]))


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    config: RunConfig,
    tokenizer: Tokenizer,
) -> Path:
    """Write RUN/checkpoints/step_N, then delete old ones (`delete_old`); returns its folder.

    CheckpointError when it cannot be written; then no part of it is left and older checkpoints are untouched.
    """
    temporary = hidden(run_dir, step)
    try:
        begin(temporary)
        temporary.mkdir()
        save_file(parameters(model), temporary / "model.safetensors")
        save_file(optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        folder = finish(temporary, trainer, config, tokenizer, {})
    except (OSError, SafetensorError) as error:
        raise unwritten(temporary, error) from error
    delete_old(run_dir, config)
    return folder


def hidden(run_dir: Path, step: int) -> Path:
    """The folder in which to write the checkpoint of a step."""
    return run_dir / "checkpoints" / f".step_{step:08d}"


def begin(temporary: Path) -> None:
    """Make room for a hidden folder, which is not made yet; removes what a killed run left."""
    temporary.parent.mkdir(exist_ok=True)
    for left_over in temporary.parent.glob(".step_*"):  # of a process killed while it wrote or deleted
        shutil.rmtree(left_over)


def finish(
    temporary: Path, trainer: dict[str, Any], config: RunConfig, tokenizer: Tokenizer, sha256: dict[str, str]
) -> Path:
    """Add what is no tensor, flush all to disk and give the folder its name; `sha256` is of files already flushed."""
    write_config(temporary, config)
    share_alike(temporary, "config.yaml")
    tokenizer.save(temporary)
    own = [p for p in sorted(temporary.iterdir()) if p.is_file()]
    trainer = trainer | {"sha256": sha256 | {p.name: sha256_of(p) for p in own}}
    content = json.dumps({"sha256": _digest(trainer), "trainer": trainer}, indent=1)
    (temporary / "trainer.json").write_text(content + "\n", encoding="utf-8")
    for path in (*own, temporary / "trainer.json", temporary):
        flush(path)
    folder = temporary.rename(temporary.with_name(temporary.name[1:]))
    flush(folder.parent)
    return folder


def unwritten(temporary: Path, error: BaseException) -> CheckpointError:
    """The error to raise when the checkpoint in a hidden folder could not be written; removes it."""
    shutil.rmtree(temporary, ignore_errors=True)
    older = checkpoints(temporary.parent.parent)
    newest = f"the newest whole checkpoint is {older[-1]}" if older else "there is no older checkpoint"
    folder = temporary.with_name(temporary.name[1:])
    return CheckpointError(f"checkpoint {folder} could not be written ({error}); {newest}")


def delete_old(run_dir: Path, config: RunConfig) -> None:
    """Delete all checkpoints but the newest `train.keep_last` and the milestones, every `train.keep_every` steps."""
    every = config.train.keep_every
    for old in checkpoints(run_dir)[: -config.train.keep_last]:
        if every == 0 or int(old.name[5:]) % every:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))  # hidden first: half a folder is no checkpoint


def verify(folder: Path, optimizer: bool = True, contents: bool = True) -> dict[str, Any]:
    """The checkpoint's trainer values, once every file's checksum agreed. CheckpointError names what is wrong.

    The optimizer's files are the largest, and only training reads them: without `optimizer` they are left alone.
    Without `contents` only trainer.json is checked.
    """
    try:
        content = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        trainer: dict[str, Any] = content["trainer"]
        if content["sha256"] != _digest(trainer):
            raise ValueError("it does not match its own checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, "trainer.json", str(error)) from error
    for name, expected in trainer["sha256"].items():
        path = folder / name
        if not contents or (name.startswith("optimizer") and not optimizer):
            continue
        if not path.is_file():
            raise _damaged(folder, name, "it is missing")
        if sha256_of(path) != expected:
            raise _damaged(folder, name, "it does not match its checksum: truncated or altered")
    return trainer


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a verified checkpoint's tensors into a model and an optimizer built from the same configuration."""
    tensors = load_file(folder / "model.safetensors")
    own = dict(model.named_parameters())
    if own.keys() != tensors.keys():
        raise CheckpointError(f"{folder} holds other parameters than the model: {sorted(own.keys() ^ tensors.keys())}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        what, name = key.split(".", 1)
        optimizer.state[own[name]][what] = tensor.to(own[name].device)


def random_state() -> dict[str, str]:
    """torch's global generators, as text."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def set_random_state(states: dict[str, str]) -> None:
    setters = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
    for device, text in states.items():
        if device == "cpu" or torch.cuda.is_available():
            setters[device](torch.from_numpy(np.frombuffer(base64.b64decode(text), np.uint8).copy()))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter once, so that a tied output head is not stored twice."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{key}.{name}": t for name, p in model.named_parameters() for key, t in optimizer.state.get(p, {}).items()}


def _digest(trainer: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(trainer, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path, name: str, reason: str) -> CheckpointError:
    older = [p for p in checkpoints(folder.absolute().parent.parent) if p.name < folder.name]
    way_out = f"remove that folder to go on from {older[-1]}" if older else "there is no older checkpoint"
    return CheckpointError(f"checkpoint {folder} is damaged: {name}: {reason}; {way_out}")
