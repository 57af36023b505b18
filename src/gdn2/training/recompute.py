"""Activation checkpointing: what a block keeps for its backward pass, and what that pass computes again.

Applied to a built model from outside, sharded or not, before `compile`, one block at a time. The gradients are those of
the model without it: the same operations run again on the same values.
"""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gdn2.model import LanguageModel

# What "selective" keeps: the results of all that costs much arithmetic for its size. Norms, gates, convolutions and
# activations run again.
_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
# The operator, and window attention on a GPU; registered on first use.
KEPT_BY_NAME = {"gdn2::chunk", "gdn2::triton", "torch_attn::_varlen_attn"}


def recompute(model: LanguageModel, mode: str) -> None:
    """Make the backward pass of every block compute its activations again.

    Args:
        model: its blocks' `forward` is replaced; the names of parameters stay.
        mode: "none" keeps every activation; "selective" keeps the results of matrix products, attention and the
            operator, and computes the rest again; "full" keeps each block's input alone.
    """
    if mode == "none":
        return
    context: dict[str, Any] = {}
    if mode == "selective":
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks:
        block.forward = functools.partial(_checkpointed, block.forward, context)


def _checkpointed(forward: Any, context: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **context, **kwargs)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT or (isinstance(op, torch._ops.OpOverload) and op.name().partition(".")[0] in KEPT_BY_NAME)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
