"""`train.compile`: blocks compiled from outside; the model's files know nothing of it."""

from typing import Any

import torch
from torch import nn

from gdn2.model import LanguageModel


def compile_blocks(model: LanguageModel, **options: Any) -> None:
    """Compile each block by `torch.compile`, with its `options`; after recomputation has been chosen.

    That the number of packed documents is another one in each batch is said from the first on: torch would find out by
    compiling again, and all blocks, in training and in evaluation, share its limit of eight compilations.
    """
    for block in model.blocks:
        block.compile(**options)
    model.register_forward_pre_hook(_let_documents_vary, with_kwargs=True)


def _let_documents_vary(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cu_seqlens = kwargs.get("cu_seqlens")
    if cu_seqlens is None:
        return args, kwargs
    # To torch a size of one is always a case of its own: one document is given an empty one behind it, of which nothing
    # is seen but in states.
    if cu_seqlens.shape[0] == 2 and not kwargs.get("output_state", True):
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:]])
    torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
    return args, kwargs | {"cu_seqlens": cu_seqlens}
