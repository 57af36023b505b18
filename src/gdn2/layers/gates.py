"""The gates of the delta rule, as functions of the layer's input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.decay import Float32Parameters, init_rate, init_step
from gdn2.layers.linear import Linear, low_rank
from gdn2.ops.projected import log_decay_of


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

    def project(self, x: Tensor) -> Tensor:
        """f [B, T, H, K]."""
        f: Tensor = self.projection(x)
        return f.unflatten(-1, (self.num_heads, self.key_dim))

    def activate(self, f: Tensor) -> Tensor:
        """The log-decay of projected f [B, T, H * K]."""
        f = f.unflatten(-1, (self.num_heads, self.key_dim))
        if self.lower_bound is None:
            return log_decay_of(f, self.rate, self.delta)
        f = f.to(self.delta.dtype) + self.delta.view(self.num_heads, self.key_dim)
        return self.lower_bound * torch.sigmoid(self.rate.exp()[:, None] * f)


class Gates(nn.Module):
    """What a delta mixer's memory forgets, erases and writes: a function of its input.

    forward: [B, T, d_model] -> log-decay [B, T, H, K or 1], or None; erase [B, T, H, K or 1] in [0, largest_erase];
    write [B, T, HV, V or 1] in [0, largest_write]. A gate with one channel is shared by all of its head's.

    project: the same tensors before their activation. `plain` tells that the activation is that of
    `rule_from_projections`, with `decay_parameters`.
    """

    decay: DecayGate | None

    def __init__(self, largest_erase: float, largest_write: float, plain: bool) -> None:
        super().__init__()
        self.largest_erase, self.largest_write, self.plain = largest_erase, largest_write, plain

    def project(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        raise NotImplementedError

    def decay_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """rate [H] and delta [H * K or H], Nones without decay."""
        return (None, None) if self.decay is None else (self.decay.rate, self.decay.delta)

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        f, b, w = self.project(x)
        log_decay = None if self.decay is None or f is None else self.decay.activate(f.flatten(-2))
        return log_decay, self.largest_erase * torch.sigmoid(b), self.largest_write * torch.sigmoid(w)


class TiedGates(Gates):
    """One beta = sigmoid(W_beta x) per head erases and writes alike, doubled when negative eigenvalues are allowed.

    Args:
        decay: the gate of the log-decay, None for no decay.
    """

    def __init__(
        self, d_model: int, num_heads: int, decay: DecayGate | None, negative_eigenvalues: bool = False
    ) -> None:
        largest = 2.0 if negative_eigenvalues else 1.0
        super().__init__(largest, largest, plain=decay is None or decay.lower_bound is None)
        self.decay = decay
        self.beta = Linear(d_model, num_heads, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        beta = self.beta(x).unsqueeze(-1)
        return None if self.decay is None else self.decay.project(x), beta, beta


class OpenGates(Gates):
    """Nothing decays, nothing is erased, everything is written; there is nothing to learn."""

    def __init__(self, num_heads: int) -> None:
        super().__init__(1.0, 1.0, plain=False)
        self.decay, self.num_heads = None, num_heads

    def forward(self, x: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, x.new_zeros(*x.shape[:2], self.num_heads, 1), x.new_ones(*x.shape[:2], self.num_heads, 1)


class ChannelGates(Gates):
    """The gates of Gated DeltaNet-2: decay and erase per key channel, write per value channel.       (11, 12)

    erase b = sigmoid(W_b x), doubled when negative eigenvalues are allowed; write w = sigmoid(W_w x). Without
    `channel_erase` or `channel_write` that gate is averaged over its head's channels: the ablations of Table 5, with
    as many parameters.
    """

    decay: DecayGate

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
        plain = channel_erase and channel_write and decay_lower_bound is None
        super().__init__(2.0 if negative_eigenvalues else 1.0, 1.0, plain)
        self.key_shape, self.value_shape = (num_heads, key_dim), (num_value_heads, value_dim)
        self.channel_erase, self.channel_write = channel_erase, channel_write
        self.decay = DecayGate(d_model, num_heads, key_dim, rank=value_dim, lower_bound=decay_lower_bound)
        self.erase = Linear(d_model, num_heads * key_dim, bias=False)
        self.write = Linear(d_model, num_value_heads * value_dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        erase, write = self.erase(x).unflatten(-1, self.key_shape), self.write(x).unflatten(-1, self.value_shape)
        return self.decay.project(x), erase, write

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        log_decay, erase, write = super().forward(x)
        if not self.channel_erase:
            erase = erase.mean(-1, keepdim=True)
        if not self.channel_write:
            write = write.mean(-1, keepdim=True)
        return log_decay, erase, write
