"""The channel mixer."""

import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.linear import Linear


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)); x [..., d_model], `width` hidden channels, no biases."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate = Linear(d_model, width, bias=False)
        self.up = Linear(d_model, width, bias=False)
        self.down = Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
