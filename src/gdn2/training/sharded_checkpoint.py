"""Checkpoints of several processes: each writes its share, by torch.distributed.checkpoint, as safetensors.

The folder is that of `checkpoint.py` with a folder optimizer/ of one file a process in place of one file. The model is
written in shares too, which rank 0 then joins into model.safetensors, so that what reads checkpoints need not know how
they were trained. Every rank flushes and hashes its own files; rank 0 adds the rest and renames the folder once all
are done. The files must lie on storage that all ranks see.

In the background, tensors are copied first, then written by a thread with a process group of its own.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from gdn2.config import RunConfig
from gdn2.data.shards import flush, sha256_of
from gdn2.data.tokenizer import Tokenizer
from gdn2.training import checkpoint
from gdn2.training.checkpoint import CheckpointError
from gdn2.training.distributed import Ranks

Tensors = dict[str, Tensor]


class ShardedCheckpoints:
    """Writes the checkpoints of one run of several processes, which call each method together."""

    def __init__(self, run_dir: Path, config: RunConfig, tokenizer: Tokenizer, ranks: Ranks) -> None:
        self._run_dir, self._config, self._tokenizer, self._ranks = run_dir, config, tokenizer, ranks
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout))
        self._thread = ThreadPoolExecutor(1) if config.train.background_checkpoints else None
        self._pending: Future[None] | None = None

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, trainer: dict[str, Any]) -> None:
        """Write a checkpoint, or begin to. CheckpointError, on all ranks, where one could not write its share."""
        self.wait()
        tensors = (checkpoint.parameters(model), checkpoint.optimizer_tensors(model, optimizer))
        if self._thread is None:
            self._write(step, *tensors, trainer)
        else:
            copies = [{name: t.detach().to("cpu", copy=True) for name, t in some.items()} for some in tensors]
            self._pending = self._thread.submit(self._write, step, copies[0], copies[1], trainer)

    def wait(self) -> None:
        """Until nothing is being written. CheckpointError where that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, weights: Tensors, optimizer: Tensors, trainer: dict[str, Any]) -> None:
        temporary = checkpoint.hidden(self._run_dir, step)
        # What a killed run left is gone before anyone writes.
        self._first_rank_does(temporary, lambda: checkpoint.begin(temporary))
        error, sha256 = None, {}
        try:
            for name, tensors in (("model", weights), ("optimizer", optimizer)):
                writer = HuggingFaceStorageWriter(str(temporary / name), save_distributed=True)
                dcp.save(tensors, storage_writer=writer, process_group=self._group)
            for path in (temporary / "optimizer").iterdir():
                if _rank_of(path) == self._ranks.rank:
                    flush(path)
                    sha256[str(path.relative_to(temporary))] = sha256_of(path)
        except CheckpointException as failure:  # on every rank
            error = str(_first(failure))
        except OSError as failure:
            error = str(failure)
        reports: list[tuple[str | None, dict[str, str]]] = [(None, {})] * self._ranks.size
        dist.all_gather_object(reports, (error, sha256), group=self._group)
        failed = next((message for message, _ in reports if message is not None), None)

        def finish() -> None:
            if failed is not None:
                raise OSError(failed)
            _join_shares(temporary / "model", weights)
            flush(temporary / "optimizer")
            everyone = {name: digest for _, some in reports for name, digest in some.items()}
            checkpoint.finish(temporary, trainer, self._config, self._tokenizer, everyone)
            checkpoint.delete_old(self._run_dir, self._config)

        self._first_rank_does(temporary, finish)

    def _first_rank_does(self, temporary: Path, action: Callable[[], object]) -> None:
        """All wait for it. CheckpointError on all ranks where it fails."""
        outcome: list[str | None] = [None]
        if self._ranks.main:
            try:
                action()
            except (OSError, SafetensorError) as failure:
                outcome = [str(checkpoint.unwritten(temporary, failure))]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise CheckpointError(outcome[0])


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a verified checkpoint of any number of processes into a model and an optimizer, sharded or not.

    Each process reads what it keeps. CheckpointError where names or shapes do not fit.
    """
    weights: Tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    share = folder if (folder / "optimizer.safetensors").is_file() else folder / "optimizer"
    states: Tensors = {}
    if HuggingFaceStorageReader(str(share)).read_metadata().state_dict_metadata.keys() - weights.keys():
        for name, parameter in model.named_parameters():
            for what, tensor in _empty_state(optimizer, parameter).items():
                states[f"{what}.{name}"] = tensor
    # else the run was stopped before its first step, and its optimizer had none
    try:
        for tensors, place in ((weights, folder), (states, share)):
            _read(tensors, place, alone=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"{folder} does not fit the model: {_first(error)}") from error


def _empty_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Mapping[str, Tensor]:
    """AdamW's state of a parameter, made if the optimizer has not stepped yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


def _read(tensors: Tensors, folder: Path, alone: bool) -> None:
    """Fill the tensors from the safetensors files of a folder, by this process alone or all together."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is meant
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def _join_shares(folder: Path, like: Tensors) -> None:
    """Turn a folder of shares into one safetensors file beside it, and remove the folder."""
    whole = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in like.items()}
    _read(whole, folder, alone=True)
    save_file(whole, folder.with_suffix(".safetensors"))
    shutil.rmtree(folder)


def _rank_of(path: Path) -> int:
    """Which rank wrote a share: torch numbers them from 1 in the order of ranks."""
    return int(path.name.split("-")[1]) - 1


def _first(error: CheckpointException) -> BaseException:
    """The first rank's own error."""
    failure = next(iter(error.failures.values()), None)
    return failure[0] if isinstance(failure, tuple) else error
