"""The memory of a training step, found by running a block of each kind on fake tensors: shapes and dtypes, no numbers.

Nothing is allocated. For a GPU the fake tensors take the path of the fused kernels, wherever this runs; for a CPU the
operator's own code runs too (`workspace.py`). What the GPU's kernels need for a moment, the allocator's rounding and
CUDA's own context (about half a GiB) are not counted.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdn2.config import ModelConfig, RunConfig
from gdn2.model import LanguageModel
from gdn2.ops.fused import planning
from gdn2.training.optim import state_bytes
from gdn2.training.recompute import recompute
from gdn2.training.workspace import run_inside


class Held(NamedTuple):
    """Bytes that one part of the model holds for a micro-batch.

    forward: right after its forward pass, with the bf16 copies of weights that autocast keeps until the loss is there.
    kept: from then until its backward pass.
    backward: at most more than `kept`, within its backward pass.
    gradients: of its parameters.
    """

    forward: int
    kept: int
    backward: int
    gradients: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one device. `parts` are the kinds of blocks and "loss": head, norm and logits."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    parts: dict[str, Held]


class Live(TorchDispatchMode):
    """Counts bytes of storages that operations made within it: those alive, `now`, and the most there were, `peak`.

    Those made inside the operator's ops count for `peak` with `inside`, which takes fake tensors.
    """

    def __init__(self, ignored: Sequence[Tensor] = (), inside: bool = False) -> None:
        super().__init__()
        self._inside = inside
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in ignored:
            self._watch(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if self._inside and name.startswith("gdn2::chunk"):
            with Live([x for x in args if isinstance(x, Tensor)]) as inside, torch.autocast("cpu", enabled=False):
                run_inside(name, args)
            self.peak = max(self.peak, self.now + inside.peak)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf, leaf.untyped_storage().nbytes())
        return out

    def _watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def estimate(config: RunConfig, mode: str, on_gpu: bool, precision: str) -> Memory:
    """Memory of a step of `config` with the activation checkpointing `mode`, on one device that has all of the weights
    but those of other ranks of `parallel.tensor`.

    Packed sequences are taken to need what as many tokens need unpacked.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    counts = Counter(config.model.layer_kinds)  # blocks of a kind are alike: one of each is run
    model = on_meta(replace(config.model, cell=tuple(counts), num_layers=len(counts)), config.parallel.tensor)
    accumulates = config.train.batch_tokens > config.train.micro_batch * config.data.seq_len
    shape = (config.train.micro_batch, config.data.seq_len)
    with FakeTensorMode(), planning() if on_gpu else nullcontext():
        fill(model)
        recompute(model, mode)

        def cast() -> AbstractContextManager[Any]:
            return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

        parts = {}
        x = torch.empty(*shape, config.model.d_model)
        for kind, block in zip(counts, model.blocks):
            parts[kind] = measure(block, partial(first_output, block), x, cast, accumulates)
        model.blocks = nn.ModuleList()
        tokens = torch.empty(shape, dtype=torch.int64)
        parts["loss"] = measure(model, lambda _: model.loss(tokens, tokens), x, cast, accumulates)
    whole = on_meta(config.model, config.parallel.tensor)
    weights = gradients = sum(p.nbytes for p in whole.parameters())
    optimizer = state_bytes(whole, config.optim)
    order = [parts[kind] for kind in config.model.layer_kinds] + [parts["loss"]]
    base = weights + optimizer + (gradients if accumulates else 0)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=sum(part.kept for part in order),
        peak=max(base + highest(order, accumulates), weights + optimizer + gradients),
        parts=parts,
    )


def on_meta(config: ModelConfig, tensor: int = 1) -> LanguageModel:
    """A model without numbers, with the heads and MLP channels of one of `tensor` ranks."""
    with torch.device("meta"):
        model = LanguageModel(config)
    if tensor > 1:
        from gdn2.training.tensor_parallel import narrow  # takes seconds to import

        narrow(model, tensor)
    return model


def first_output(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(x, None, None, False)[0]
    return y


def highest(order: Sequence[Held], accumulates: bool) -> int:
    """The most bytes at once, of activations and of gradients that are not there yet, forward and then backward."""
    most, live = sum(part.forward for part in order), sum(part.kept for part in order)
    for part in reversed(order):
        most = max(most, live + part.backward)
        live += (0 if accumulates else part.gradients) - part.kept
    return most


def measure(
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    cast: Callable[[], AbstractContextManager[Any]],
    accumulates: bool,
) -> Held:
    """Run a part forward from x and backward, and see what it holds."""
    parameters = list(module.parameters())
    if accumulates:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
    x = x.detach().requires_grad_()
    known = [*parameters, x, *(p.grad for p in parameters if p.grad is not None)]
    with Live(known, inside=True) as live:
        with cast():
            y = run(x)
            forward = live.now
        kept = live.now
        gradient = torch.empty_like(y)
        live.peak = live.now
        y.backward(gradient)
        del gradient
        backward = live.peak - kept
    for parameter in parameters:
        parameter.grad = None
    return Held(forward, kept, backward, sum(p.nbytes for p in parameters))


def fill(model: nn.Module) -> None:
    """Replace parameters on the meta device by fake ones; within a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(fake))
