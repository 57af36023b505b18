"""Normalisation. All of it is computed in at least float32 and returned in its input's dtype.

Under autocast a float32 input of RMSNorm gives a result in autocast's dtype. It is what the projections behind it read:
each would cast it again, and keep its own copy for the backward pass.
"""

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

            return rms_norm(x, self.weight, self.eps, dtype=result_dtype(x.dtype, x.device))
        return self.wide(x).to(result_dtype(x.dtype, x.device))

    def wide(self, x: Tensor) -> Tensor:
        """The norm in at least float32, unfused."""
        x = at_least_float32(x)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and its norm; one operation where operations are fused."""
        if fused(x):
            from gdn2.ops.kernels.norm import add_rms_norm

            wider = torch.promote_types(x.dtype, added.dtype)
            return add_rms_norm(x, added, self.weight, self.eps, result_dtype(wider, x.device))
        x = x + added
        return x, self(x)


class GatedRMSNorm(RMSNorm):
    """RMSNorm of x times SiLU of a gate; x and gate [..., dim]. The weight is shared by all heads."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        if fused(x):
            from gdn2.ops.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps, gate)
        return (self.wide(x) * F.silu(at_least_float32(gate))).to(gate.dtype)


class SigmoidGatedRMSNorm(RMSNorm):
    """RMSNorm of x times the sigmoid of a gate; x and gate [..., dim]. The weight is shared by all heads."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return (self.wide(x) * torch.sigmoid(at_least_float32(gate))).to(gate.dtype)


def result_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of RMSNorm of numbers of this dtype: the same, or autocast's in place of float32."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if dtype == torch.float32 and torch.is_autocast_enabled(kind) else dtype


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`unit_length`, fused where operations are."""
    if fused(x):
        from gdn2.ops.kernels import norm

        return norm.l2_norm(x, eps)
    return unit_length(x, eps)
