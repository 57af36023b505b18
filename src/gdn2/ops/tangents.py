"""Forward-mode differentiation is refused: torch.library's ops would drop the tangents, and give zero in silence."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_tangents(*inputs: Any) -> None:
    """NotImplementedError where a tensor carries a tangent: `torch.func.jvp`, `torch.autograd.forward_ad`."""
    if not differentiates_forward():
        return
    for x in inputs:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "gdn2's ops have no forward-mode derivatives; expected tensors without tangents, or backend='reference'"
            )


def differentiates_forward() -> bool:
    """Whether tensors may carry tangents here; compiled code is traced without."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
