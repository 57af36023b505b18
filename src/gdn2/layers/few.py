"""When few texts are decoded: the products of a step as kernels that take the norm before and the sum after along."""

from typing import cast

import torch
from torch import Tensor, nn

from gdn2.ops.fused import fused


def few(x: Tensor, *layers: nn.Module) -> bool:
    """Whether `gdn2.ops.kernels.project` multiplies the rows of x, or as many others like them, by these weights.

    It does so on a GPU without gradients and autocast, for few rows; weights of 8 bits have a kernel of their own.
    """
    if not fused(x) or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    if torch.compiler.is_compiling() or not all(isinstance(layer, (nn.Linear, nn.Embedding)) for layer in layers):
        return False
    from gdn2.ops.kernels import project

    return all(project.fits(x, cast(Tensor, layer.weight)) for layer in layers)
