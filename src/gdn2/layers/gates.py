"""The gates of the delta rule, as functions of the layer's input."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.linear import Linear, at_least_float32, low_rank


class DecayGate(nn.Module):
    """Log-decay of every key channel, in nats:  g = -exp(a) * softplus(W_f x + delta)          (12, 86)

    a is `rate` [H], one per key head; delta [H * K] one per key channel; W_f is low rank. rate and delta stay float32
    through `.to(bfloat16)` and `.half()`, so that g is computed in float32 whatever the dtype of the model or autocast,
    and take no weight decay.
    """

    float32_parameters = ("rate", "delta")

    def __init__(self, d_model: int, num_heads: int, key_dim: int, rank: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim = num_heads, key_dim
        self.projection = low_rank(d_model, rank, num_heads * key_dim)
        self.rate = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.delta = nn.Parameter(torch.empty(num_heads * key_dim, dtype=torch.float32))
        self._mark()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """rate = log U(1, 16); delta = the inverse softplus of dt, log-uniform in [1e-3, 1e-1].

        (The paper then floors dt at 1e-4, which no draw can reach.)
        """
        nn.init.uniform_(self.rate, 1, 16).log_()
        nn.init.uniform_(self.delta, math.log(1e-3), math.log(1e-1)).exp_()
        self.delta.add_(torch.log(-torch.expm1(-self.delta)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_model] -> log-decay [B, T, H, K] <= 0, float32 (float64 in a float64 model)."""
        step = F.softplus(self.projection(x).to(self.delta.dtype) + self.delta)
        return -self.rate.exp()[:, None] * step.unflatten(-1, (self.num_heads, self.key_dim))

    def _mark(self) -> None:
        for name in self.float32_parameters:
            getattr(self, name).no_weight_decay = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Module.to, .cuda, .to_empty ... all come through here; `fn` is handed one parameter or gradient at a time.

        A cast of a float32 parameter to a narrower type is replaced by a move, so that its bits survive; afterwards the
        marks are put back, since leaving the meta device makes new Parameters.
        """
        named = [getattr(self, name) for name in self.float32_parameters]
        kept = {id(t) for p in named for t in (p, p.grad) if t is not None}

        def keep_float32(t: Tensor) -> Tensor:
            out = fn(t)
            if id(t) in kept and out.dtype != at_least_float32(out).dtype:
                return t.to(out.device, torch.float32)
            return out

        super()._apply(keep_float32, recurse)
        self._mark()
        return self


class ChannelGates(nn.Module):
    """The gates of Gated DeltaNet-2: decay and erase per key channel, write per value channel.       (11, 12)

    erase b = sigmoid(W_b x), doubled when negative eigenvalues are allowed; write w = sigmoid(W_w x).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_value_heads: int,
        key_dim: int,
        value_dim: int,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__()
        self.key_shape, self.value_shape = (num_heads, key_dim), (num_value_heads, value_dim)
        self.largest_erase = 2.0 if negative_eigenvalues else 1.0
        self.decay = DecayGate(d_model, num_heads, key_dim, rank=value_dim)
        self.erase = Linear(d_model, num_heads * key_dim, bias=False)
        self.write = Linear(d_model, num_value_heads * value_dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, d_model] -> log-decay [B, T, H, K] float32, erase [B, T, H, K], write [B, T, HV, V]."""
        erase = self.largest_erase * torch.sigmoid(self.erase(x)).unflatten(-1, self.key_shape)
        write = torch.sigmoid(self.write(x)).unflatten(-1, self.value_shape)
        return self.decay(x), erase, write
