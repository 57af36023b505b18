"""The gates of the delta rule, as functions of the layer's input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.decay import Float32Parameters, init_rate, init_step
from gdn2.layers.linear import Linear, low_rank
from gdn2.ops.fused import fused


class DecayGate(Float32Parameters):
    """Log-decay of every key channel, in nats:  g = -exp(a) * softplus(W_f x + delta)          (12, 86)

    a is `rate` [H], one per key head; delta [H * K] one per key channel; W_f is of low rank, or a full matrix when
    rank is None. With a lower bound, g = lower_bound * sigmoid(exp(a) * (W_f x + delta)), which starts at the same
    decays. rate and delta stay float32 through `.to(bfloat16)` and `.half()`, so that g is computed in float32 whatever
    the dtype of the model or autocast, and take no weight decay.

    ValueError when the lower bound is not below 0.
    """

    float32_parameters = ("rate", "delta")

    def __init__(
        self, d_model: int, num_heads: int, key_dim: int, rank: int | None, lower_bound: float | None = None
    ) -> None:
        super().__init__()
        if lower_bound is not None and not lower_bound < 0:
            raise ValueError(f"the lower bound of the log-decay is {lower_bound}; expected a number below 0, or None")
        self.num_heads, self.key_dim, self.lower_bound = num_heads, key_dim, lower_bound
        keys = num_heads * key_dim
        self.projection: nn.Module = Linear(d_model, keys, False) if rank is None else low_rank(d_model, rank, keys)
        self.rate = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.delta = nn.Parameter(torch.empty(num_heads * key_dim, dtype=torch.float32))
        self._mark()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """rate = log U(1, 16); delta = the inverse softplus of dt, log-uniform in [1e-3, 1e-1].

        With a lower bound delta is such that the decay at W_f x = 0 is that of the same dt, at most half the bound.
        """
        init_rate(self.rate)
        init_step(self.delta)
        if self.lower_bound is not None:
            rate = self.rate.detach().exp().repeat_interleave(self.key_dim)
            share = (rate * F.softplus(self.delta.detach()) / -self.lower_bound).clamp(max=0.5)
            with torch.no_grad():
                self.delta.copy_(torch.logit(share) / rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_model] -> log-decay [B, T, H, K] <= 0, float32 (float64 in a float64 model)."""
        return self.activate(self.projection(x))

    def activate(self, f: Tensor) -> Tensor:
        """The log-decay of projected f [B, T, H * K]."""
        f, rate = (f.to(self.delta.dtype) + self.delta).unflatten(-1, (self.num_heads, self.key_dim)), self.rate.exp()
        if self.lower_bound is not None:
            return self.lower_bound * torch.sigmoid(rate[:, None] * f)
        return -rate[:, None] * F.softplus(f)


class Gates(nn.Module):
    """What a delta mixer's memory forgets, erases and writes: a function of its input.

    forward: [B, T, d_model] -> log-decay [B, T, H, K or 1], or None; erase [B, T, H, K or 1] in [0, largest_erase];
    write [B, T, HV, V or 1] in [0, largest_write]. A gate with one channel is shared by all of its head's.
    """

    def __init__(self, largest_erase: float, largest_write: float) -> None:
        super().__init__()
        self.largest_erase, self.largest_write = largest_erase, largest_write


class TiedGates(Gates):
    """One beta = sigmoid(W_beta x) per head erases and writes alike, doubled when negative eigenvalues are allowed.

    Args:
        decay: the gate of the log-decay, None for no decay.
    """

    def __init__(
        self, d_model: int, num_heads: int, decay: DecayGate | None, negative_eigenvalues: bool = False
    ) -> None:
        largest = 2.0 if negative_eigenvalues else 1.0
        super().__init__(largest, largest)
        self.decay = decay
        self.beta = Linear(d_model, num_heads, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        beta = self.largest_erase * torch.sigmoid(self.beta(x)).unsqueeze(-1)
        return None if self.decay is None else self.decay(x), beta, beta


class ChannelGates(Gates):
    """The gates of Gated DeltaNet-2: decay and erase per key channel, write per value channel.       (11, 12)

    erase b = sigmoid(W_b x), doubled when negative eigenvalues are allowed; write w = sigmoid(W_w x). Without
    `channel_erase` or `channel_write` that gate is averaged over its head's channels: the ablations of Table 5, with
    as many parameters. `plain` tells that neither these nor a lower bound of the decay change the gates.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_value_heads: int,
        key_dim: int,
        value_dim: int,
        negative_eigenvalues: bool = False,
        channel_erase: bool = True,
        channel_write: bool = True,
        decay_lower_bound: float | None = None,
    ) -> None:
        super().__init__(2.0 if negative_eigenvalues else 1.0, 1.0)
        self.key_shape, self.value_shape = (num_heads, key_dim), (num_value_heads, value_dim)
        self.channel_erase, self.channel_write = channel_erase, channel_write
        self.plain = channel_erase and channel_write and decay_lower_bound is None
        self.decay = DecayGate(d_model, num_heads, key_dim, rank=value_dim, lower_bound=decay_lower_bound)
        self.erase = Linear(d_model, num_heads * key_dim, bias=False)
        self.write = Linear(d_model, num_value_heads * value_dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, d_model] -> log-decay [B, T, H, K] float32, erase [B, T, H, K], write [B, T, HV, V]; see the class."""
        f, b, w = self.project(x)
        if fused(f) and self.decay.lower_bound is None:
            from gdn2.ops.kernels.activation import gates

            log_decay, erase, write = gates(f, b, w, self.decay.rate, self.decay.delta, self.largest_erase)
            log_decay = log_decay.unflatten(-1, self.key_shape)
        else:
            log_decay, erase, write = self.decay.activate(f), self.largest_erase * torch.sigmoid(b), torch.sigmoid(w)
        erase, write = erase.unflatten(-1, self.key_shape), write.unflatten(-1, self.value_shape)
        if not self.channel_erase:
            erase = erase.mean(-1, keepdim=True)
        if not self.channel_write:
            write = write.mean(-1, keepdim=True)
        return log_decay, erase, write

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, d_model] -> the pre-activations of decay and erase [B, T, H * K] and of write [B, T, HV * V]."""
        return self.decay.projection(x), self.erase(x), self.write(x)
