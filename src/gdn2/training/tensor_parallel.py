"""Tensor parallelism: each rank has some heads of every mixer and some channels of every MLP.

The first Linears of a layer are split by their outputs, which are heads or MLP channels, the last one by its inputs;
its outputs are summed over the ranks. What belongs to a head (convolutions, rate and delta) goes with it; the output
norm's weight, which heads share, is on all ranks and sums its gradient. Embedding, output head and the norms between
layers are whole on every rank (FSDP still shards the first two): their tokens are.

Parameters become DTensors; inside a layer everything between the Linears works on plain local tensors.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from gdn2.layers import SlidingWindowAttention
from gdn2.layers.delta import DeltaMixer
from gdn2.layers.gates import OpenGates
from gdn2.model import Block, LanguageModel

# Parameters that a layer's own code reads, by the module that has them: how they lie, and how their gradients come out.
HEADS = (Shard(0), Shard(0))
SHARED = (Replicate(), Partial())
Local = list[tuple[nn.Module, str, tuple[Placement, Placement]]]


class Split(NamedTuple):
    """How a layer lies over the ranks, by names of its modules.

    columns: Linears split by outputs. rows: the one split by inputs. whole: Linears that every rank has. heads,
    shared: parameters that the layer's own code reads, with the module that has them: of heads, and of all of them.
    arguments: of the layer's forward.
    """

    layer: nn.Module
    arguments: int
    columns: list[str]
    rows: str
    whole: list[str]
    heads: list[tuple[nn.Module, str]]
    shared: list[tuple[nn.Module, str]]


def split_tensors(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Split the layers of a model over the ranks of a mesh of one axis, in place.

    Heads and MLP channels divide by their number: see `parallel.check_parallel`.
    """
    for split in _share_out(model, mesh.size()):
        if isinstance(gates := getattr(split.layer, "gates", None), OpenGates):
            gates.register_forward_pre_hook(_local_input)  # they take only shape and device from it
        _apply(split, mesh)
        local: Local = [(module, name, HEADS) for module, name in split.heads]
        local += [(module, name, SHARED) for module, name in split.shared]
        if local:
            _use_local(split.layer, mesh, local)


def narrow(model: LanguageModel, size: int) -> None:
    """Make the layers of a model as small as those of one of `size` ranks, in place; their values are lost."""
    for split in _share_out(model, size):
        cut = [(module, name, 0) for module, name in split.heads]
        for linear in map(split.layer.get_submodule, split.columns):
            cut += [(linear, name, 0) for name, parameter in linear.named_parameters()]
        cut.append((split.layer.get_submodule(split.rows), "weight", 1))
        for module, name, dim in cut:
            old = module.get_parameter(name)
            new = nn.Parameter(torch.empty_like(old.chunk(size, dim)[0]))
            if getattr(old, "no_weight_decay", False):
                new.no_weight_decay = True  # type: ignore[attr-defined]
            module.register_parameter(name, new)


def _share_out(model: LanguageModel, size: int) -> Iterator[Split]:
    """Give each layer one rank's heads, and say what must follow."""
    for block in model.blocks:
        block = cast(Block, block)
        mixer = block.mixer
        if isinstance(mixer, DeltaMixer):
            yield _share_delta(mixer, size)
        elif isinstance(mixer, SlidingWindowAttention):
            mixer.num_heads = mixer.num_heads // size
            yield Split(mixer, 4, ["q_proj", "k_proj", "v_proj"], "out_proj", [], [], [])
        yield Split(block.mlp, 1, ["gate", "up"], "down", [], [], [])


def _share_delta(mixer: DeltaMixer, size: int) -> Split:
    heads = mixer.num_heads = mixer.num_heads // size
    value_heads = mixer.num_value_heads = mixer.num_value_heads // size
    gates: Any = mixer.gates
    if hasattr(gates, "key_shape"):
        gates.key_shape, gates.value_shape = (heads, mixer.key_dim), (value_heads, mixer.value_dim)
    if isinstance(gates, OpenGates):
        gates.num_heads = heads
    columns = ["q_proj", "k_proj", "v_proj"]
    columns += [f"gates.{name}" for name in ("erase", "write", "beta") if hasattr(gates, name)]
    own: list[tuple[nn.Module, str]] = [(mixer, name) for name in ("conv_q", "conv_k", "conv_v")]
    low_rank = {"output_gate": getattr(mixer, "output_gate", None)}
    if gates.decay is not None:
        gates.decay.num_heads = heads
        low_rank["gates.decay.projection"] = gates.decay.projection
        own += [(gates.decay, name) for name in ("rate", "delta")]
    whole = []
    for name, module in low_rank.items():
        if isinstance(module, nn.Sequential):
            whole.append(f"{name}.0")
            columns.append(f"{name}.1")
        elif module is not None:
            columns.append(name)
    return Split(mixer, 4, columns, "out_proj", whole, own, [(mixer.norm, "weight")])


def _apply(split: Split, mesh: DeviceMesh) -> None:
    """Split a layer's Linears; its first argument comes whole.

    It becomes a DTensor once, so that the gradients that reach it by several Linears are summed over ranks once.
    """
    layouts = (Replicate(), *[None] * (split.arguments - 1))
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in split.columns}
    plan[split.rows] = RowwiseParallel()
    parallelize_module(split.layer, mesh, plan)
    for name in split.whole:
        linear = cast(nn.Linear, split.layer.get_submodule(name))
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Replicate()]))
    PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)._apply(split.layer, mesh)


def _local_input(_: nn.Module, args: tuple[DTensor]) -> tuple[Any]:
    return (args[0].to_local(),)


def _use_local(layer: nn.Module, mesh: DeviceMesh, parameters: Local) -> None:
    """Make parameters DTensors; while the layer runs, this rank's part stands in for each."""
    for module, name, (lies, _) in parameters:
        old = getattr(module, name)
        new = nn.Parameter(distribute_tensor(old.detach(), mesh, [lies]))
        if getattr(old, "no_weight_decay", False):
            new.no_weight_decay = True  # type: ignore[attr-defined]
        module._parameters[name] = new
    kept: list[nn.Parameter] = []

    def enter(*ignored: object) -> None:
        for module, name, (_, summand) in parameters:
            parameter = cast(nn.Parameter, module._parameters.pop(name))
            kept.append(parameter)
            module.__dict__[name] = cast(DTensor, parameter).to_local(grad_placements=[summand])

    def leave(*ignored: object) -> None:
        for (module, name, _), own in zip(parameters, kept):
            del module.__dict__[name]
            module._parameters[name] = own
        kept.clear()

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave, always_call=True)
