"""Sharded weights: FSDP2's `fully_shard` on each block and on the whole, HSDP with replicas, and their gradients.

Matrices are sharded: master weights, gradients and optimizer states lie in float32 on one rank of the shards each, and
are gathered block by block, in the compute dtype. What takes no weight decay (norms, biases, the decay's rate and
delta) is small: every rank keeps it whole and in float32, and its gradients are averaged once a step. So these are
float32 in every computation, as in one process.
"""

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdn2.model import LanguageModel
from gdn2.training.distributed import Ranks
from gdn2.training.optim import takes_no_decay

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def shard(model: LanguageModel, ranks: Ranks, device: torch.device, precision: str) -> None:
    """Share out the weights of a model that every rank built alike, on the CPU, and move it to `device`, in place.

    The residual stream, embedding and output head stay as autocast has them in one process: float32 weights.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes seconds to import

    assert ranks.mesh is not None
    small = {p for p in model.parameters() if takes_no_decay(p)}
    for parameter in small:
        parameter.data = parameter.data.to(device)
    gathered = torch.bfloat16 if precision == "bf16" else None
    # Inputs are not cast: the residual stream stays float32 between blocks, and autocast casts what a Linear reads.
    policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    mesh = ranks.mesh["replicas", "fsdp"] if ranks.replicas > 1 else ranks.mesh["fsdp"]
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=small)
    whole = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=whole, ignored_params=small, reshard_after_forward=False)


def begin_micro_batch(model: nn.Module, last: bool, ranks: Ranks) -> None:
    """Replicas exchange gradients once a step, with its last micro-batch; shards with each, which spares memory."""
    if ranks.mesh is not None:
        cast("FSDPModule", model).set_requires_all_reduce(last)


def settle(model: nn.Module, ranks: Ranks) -> None:
    """Back to sharded weights after a forward pass without a backward one, which leaves the outermost gathered."""
    if ranks.mesh is not None:
        cast("FSDPModule", model).reshard()


def finish_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Average the gradients of the parameters that every rank keeps whole, as FSDP has averaged the others."""
    if ranks.mesh is None:
        return
    small = [p for p in model.parameters() if p.grad is not None and takes_no_decay(p)]
    for parameter in small:
        if hasattr(parameter, "placements"):  # with tensor parallelism ranks may have a summand each
            parameter.grad = cast("DTensor", parameter.grad).redistribute(placements=parameter.placements)
    own = [local(cast(Tensor, p.grad)) for p in small]
    flat = torch.cat([g.flatten() for g in own])
    dist.all_reduce(flat, group=ranks.token_group)
    flat /= ranks.data_size * ranks.context
    for gradient, mean in zip(own, flat.split([g.numel() for g in own])):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def clip_gradients(model: nn.Module, largest: float, ranks: Ranks) -> float:
    """Scale all gradients so that their norm, over all ranks, is at most `largest`; returns the norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if ranks.mesh is None:
        return scale_down(gradients, float(nn.utils.get_total_norm(gradients)), largest)
    from torch.distributed.tensor import DTensor

    layouts: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        layouts.setdefault(key, []).append(gradient)
    square = 0.0
    for some in layouts.values():
        own = nn.utils.get_total_norm([local(g) for g in some]).double().square()
        first = some[0]
        if isinstance(first, DTensor):
            for axis, placement in enumerate(first.placements):
                if not placement.is_replicate():
                    dist.all_reduce(own, group=first.device_mesh.get_group(axis))
        square += float(own)
    return scale_down([local(g) for g in gradients], math.sqrt(square), largest)


def scale_down(gradients: list[Tensor], norm: float, largest: float) -> float:
    """Scale gradients of the given norm to at most `largest`; below it they are not touched. Returns the norm."""
    if norm > largest:
        torch._foreach_mul_(gradients, largest / (norm + 1e-6))
    return norm


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    part = getattr(x, "to_local", None)  # that of a DTensor
    return x if part is None else part()
