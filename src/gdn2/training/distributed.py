"""The processes of one run: who is who, what they tell each other, and how they end together.

`torchrun` starts them and says by RANK, LOCAL_RANK and WORLD_SIZE which is which; without it there is one. They stand
in a mesh of replicas x shards x context x tensor, the last varying fastest, so that tensor-parallel ranks are
neighbours. Ranks that differ in replica or shard read different sequences, those that differ in context different
tokens of the same sequences, those that differ in tensor compute the same tokens.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from math import inf, prod
from threading import Thread
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gdn2.config import RunConfig, require
from gdn2.data import Batch
from gdn2.training.meeting import meet
from gdn2.training.stopping import StopSignals

if TYPE_CHECKING:
    from gdn2.training.context import Context

AXES = ("replicas", "shards", "context", "tensor")
PATIENCE = 10.0  # seconds that a rank with a signal waits for others to come, which often have one too
LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out", "gloo/transport")


class RankLostError(RuntimeError):
    """Another process of the run ended or did not answer in time."""


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


class Ranks:
    """This process among those of the run; a context within which they can talk. An error before they meet ends all.

    Attributes:
        rank, size: this process, and how many there are. main: whether it is the one that writes.
        local_rank: its number on this machine.
        replicas, shards, context, tensor: sizes of the mesh.
        data_rank, data_size: which share of the sequences it reads.
        context_rank: which share of each sequence's tokens.
        mesh: replicas x fsdp x tensor, None for one process. token_group: the ranks that have other tokens but the same
            part of each tensor. context_group: those with other tokens of the same sequences.
    """

    def __init__(self, config: RunConfig, stop: StopSignals | None = None) -> None:
        """ConfigError where the configuration does not fit the number of processes. A signal noted in `stop` ends what
        would wait for others."""
        self._stop, self._came = stop, False
        self.rank, self.size, self.local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        self.main = self.rank == 0
        self.replicas, self.shards, self.context, self.tensor = sizes = config.parallel.sizes(self.size)
        place = [self.rank // prod(sizes[i + 1 :]) % n for i, n in enumerate(sizes)]
        self.data_rank, self.data_size = place[0] * self.shards + place[1], self.replicas * self.shards
        self.context_rank = place[2]
        self.timeout = config.parallel.timeout
        self.mesh: DeviceMesh | None = None
        self.token_group: dist.ProcessGroup | None = None
        self.context_group: dist.ProcessGroup | None = None
        self.parts: Context | None = None
        self._check(config)

    def _check(self, config: RunConfig) -> None:
        sequences = config.train.batch_tokens // config.data.seq_len
        require(
            sequences % self.data_size == 0, "train.batch_tokens", config.train.batch_tokens,
            f"a multiple of data.seq_len for each of {self.data_size} ranks that read data ({config.data.seq_len} * "
            f"{self.data_size})",
        )  # fmt: skip
        self.sequences = sequences // self.data_size
        largest = min(config.train.micro_batch, self.sequences)
        self.micro_batch = next(n for n in range(largest, 0, -1) if self.sequences % n == 0)
        require(
            config.data.seq_len % self.context == 0, "data.seq_len", config.data.seq_len,
            f"a multiple of parallel.context ({self.context})",
        )  # fmt: skip

    @property
    def token_ranks(self) -> int:
        """Ranks that have tokens of their own."""
        return self.data_size * self.context

    def on_own_device(self, config: RunConfig) -> RunConfig:
        """The configuration with this rank's device: of several processes each takes the GPU of its number."""
        name = config.train.device
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return config
        require(not name.startswith("cuda:"), "train.device", name, f"cuda with {self.size} processes, one GPU each")
        return replace(config, train=replace(config.train, device=f"cuda:{self.local_rank}"))

    def start(self, device: torch.device) -> None:
        """Meet the other processes. RankRefusedError when one cannot train, RankLostError when one does not come within
        the timeout, or soon after a signal."""
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # What ranks tell each other about the run goes through the CPU, so that it never waits in a stream.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if not dist.is_initialized():
            self._meet(backend, device)
        # FSDP counts ranks of a context as shards: they hold the same weights and other tokens.
        fsdp = self.shards * self.context

        def mesh(**sizes: int) -> DeviceMesh:
            return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

        self.mesh = mesh(replicas=self.replicas, fsdp=fsdp, tensor=self.tensor)
        self.token_group = mesh(tokens=self.replicas * fsdp, tensor=self.tensor).get_group("tokens")
        self.context_group = mesh(data=self.data_size, context=self.context, tensor=self.tensor).get_group("context")

    def _meet(self, backend: str, device: torch.device) -> None:
        def begin() -> None:
            store = meet(self.rank, self.size, self.timeout)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            wait = timedelta(seconds=self.timeout)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=wait)

        self._wait_for(begin)

    def _tell(self, error: Exception) -> None:
        """Let the other ranks, which wait for this one, know of its error."""
        reason = str(error) or type(error).__name__
        with suppress(Exception):  # the error itself goes on its way, whether they come to hear of it or not
            self._wait_for(lambda: meet(self.rank, self.size, self.timeout, reason), reason)

    def _wait_for(self, meeting: Callable[[], object], reason: str = "") -> None:
        """Run `meeting` in a thread: where it waits for the others, no signal would be heard."""
        self._came = True
        failures: list[BaseException] = []

        def run() -> None:
            try:
                meeting()
            except BaseException as error:
                failures.append(error)

        thread = Thread(target=run, daemon=True)
        thread.start()
        began, deadline, told = monotonic(), inf, not reason
        while thread.is_alive() and monotonic() < deadline:
            thread.join(0.1)
            if self._stop is not None and self._stop.received is not None:
                deadline = min(deadline, monotonic() + PATIENCE)
            if not told and monotonic() > began + PATIENCE:
                print(f"rank {self.rank} of {self.size} waits for the others to tell them: {reason}", file=sys.stderr)
                told = True
        if thread.is_alive():
            raise RankLostError(
                f"rank {self.rank} of {self.size}: stopped by a signal while it waited for other ranks, which did not "
                f"come within {PATIENCE:g} s to hear of it"
            )
        if failures:
            raise failures[0]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        if error is None:
            self.barrier()  # nobody leaves while another may still ask for something
            dist.destroy_process_group()
        elif not self._came and isinstance(error, Exception):
            self._tell(error)
        elif is_lost(error):
            raise RankLostError(
                f"rank {self.rank} of {self.size}: another rank ended, or did not answer within parallel.timeout "
                f"({self.timeout:g} s); its own message says why ({' '.join(str(error).split())[:200]})"
            ) from error

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all tokens of the step: `values` are sums over this rank's own. Exact for integers below 2^53."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.tensor).tolist()  # tensor-parallel ranks counted the same tokens

    def sum_of_parts(self, values: list[list[float]]) -> list[list[float]]:
        """Sums over the ranks that work on the same sequences as this one, at other heads or other tokens."""
        if self.mesh is None or not values:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.mesh.device_type)
        for group in (self.mesh["tensor"].get_group(), self.context_group):
            dist.all_reduce(total, group=group)
        return total.tolist()

    def any_signal(self, received: str | None) -> str | None:
        """The name of the signal that this rank or another has received."""
        if self.mesh is None:
            return received
        number = torch.tensor(0 if received is None else int(signal.Signals[received]))
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else None

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self.mesh is None:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def gather(self, value: float) -> list[float]:
        """The value of each rank."""
        if self.mesh is None:
            return [value]
        values = [torch.zeros((), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(values, torch.tensor(value, dtype=torch.float64))
        return [float(v) for v in values]

    def own_tokens(self, batch: Batch) -> Batch:
        """This rank's part of its batch, whose passes must follow before that of another."""
        return batch if self.parts is None else self.parts.take(batch)

    def describe(self) -> str:
        """As in "8 processes: 2 replicas x 4 shards"; empty for one."""
        if self.size == 1:
            return ""
        sizes = {name: getattr(self, name) for name in AXES}
        return f", {self.size} processes: {' x '.join(f'{n} {name}' for name, n in sizes.items() if n > 1)}"


def is_lost(error: BaseException) -> bool:
    """Whether an error of torch.distributed tells of another process that is gone or silent."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)
