"""Normalisation. All of it is computed in at least float32 and returned in its input's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.linear import at_least_float32
from gdn2.ops.fused import fused
from gdn2.ops.projected import unit_length


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; x [..., dim]."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if fused(x):
            from gdn2.ops.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps)
        wide = at_least_float32(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and its norm; without gradients one operation where operations are fused."""
        if fused(x) and not torch.is_grad_enabled():
            from gdn2.ops.kernels.between import add_rms_norm

            return add_rms_norm(x, added, self.weight, self.eps)
        x = x + added
        return x, self(x)


class GatedRMSNorm(RMSNorm):
    """RMSNorm of x times SiLU of a gate; x and gate [..., dim]. The weight is shared by all heads."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        if fused(x):
            from gdn2.ops.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps, gate)
        return (super().forward(at_least_float32(x)) * F.silu(at_least_float32(gate))).to(gate.dtype)


class SigmoidGatedRMSNorm(RMSNorm):
    """RMSNorm of x times the sigmoid of a gate; x and gate [..., dim]. The weight is shared by all heads."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return (super().forward(at_least_float32(x)) * torch.sigmoid(at_least_float32(gate))).to(gate.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`unit_length`, fused where operations are."""
    if fused(x):
        from gdn2.ops.kernels import norm

        return norm.l2_norm(x, eps)
    return unit_length(x, eps)
