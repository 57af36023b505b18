"""The token mixer of Mamba-3, single- and multi-input."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.decay import Float32Parameters, init_step
from gdn2.layers.linear import Linear, at_least_float32, check_sizes
from gdn2.layers.norm import RMSNorm
from gdn2.layers.state import Mamba3State, check_kind, count_sequences, overwrite
from gdn2.ops import Mamba3Memory, mamba3
from gdn2.ops.short_conv import sequence_of_token

SMALLEST_RATE = 1e-4


class Mamba3(Float32Parameters):
    """Linear attention with complex decays (as rotations of q and k) and a write spread over two tokens.

        z, x, B, C, dt, a, l, phi = in_proj(.)        dt = softplus(dt + delta), A = -softplus(a), lam = sigmoid(l)
        k, q = RMSNorm(B) + bias, RMSNorm(C) + bias per head, rotated by theta_t = theta_{t-1} + pi tanh(phi) dt
        o = mamba3(q, k, x, A dt, dt, lam) + skip x        out_proj(o * SiLU(z))                          (16)

    One B, one C and one phi are shared by all heads; there is no convolution and no output norm. With rank R > 1
    (MIMO) there are R keys and queries per token, R values x * mimo_value, and R outputs, each gated by
    SiLU(z * mimo_gate), weighted by mimo_out and summed.

    Args:
        d_model: width of the input and output.
        num_heads: heads H, each with a memory of key_dim x value_dim.
        key_dim: channels K of B and C (the papers' d_state). value_dim: channels V of x per head (their head size).
        mimo_rank: R; 1 is SISO.
        rope_fraction: share of the key channels, from the first on, that are rotated, in pairs of neighbours.
        norm_eps: epsilon of the norms of B and C.

    Raises:
        ValueError: a size is below 1, or rope_fraction * key_dim is not an even number of channels from 2 to key_dim.
    """

    float32_parameters = ("delta", "skip", "key_bias", "query_bias")

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        key_dim: int = 64,
        value_dim: int = 64,
        mimo_rank: int = 1,
        rope_fraction: float = 0.5,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim, mimo_rank=mimo_rank)
        rotated = rope_fraction * key_dim
        if rotated not in range(2, key_dim + 1, 2):
            raise ValueError(
                f"rope_fraction is {rope_fraction} of {key_dim} key channels; expected an even number from 2 to all"
            )
        self.d_model, self.num_heads, self.key_dim, self.value_dim = d_model, num_heads, key_dim, value_dim
        rank, pairs = mimo_rank, int(rotated) // 2
        self.rank, self.pairs = rank, pairs
        values, keys = num_heads * value_dim, rank * key_dim
        self.widths = [values, values, keys, keys, num_heads, num_heads, num_heads, pairs]
        self.in_proj = Linear(d_model, sum(self.widths), bias=False)
        self.key_norm, self.query_norm = RMSNorm(key_dim, norm_eps), RMSNorm(key_dim, norm_eps)
        self.key_bias = nn.Parameter(torch.empty(rank, num_heads, key_dim, dtype=torch.float32))
        self.query_bias = nn.Parameter(torch.empty(rank, num_heads, key_dim, dtype=torch.float32))
        self.delta = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.skip = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        if rank > 1:
            self.mimo_value = nn.Parameter(torch.empty(rank, num_heads, value_dim))
            self.mimo_gate = nn.Parameter(torch.empty(rank, num_heads, value_dim))
            self.mimo_out = nn.Parameter(torch.empty(rank, num_heads, value_dim))
        self.out_proj = Linear(values, d_model, bias=False)
        self._mark()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """softplus(delta) log-uniform in [1e-3, 1e-1]; biases, skip and mimo_gate 1; mimo_value and mimo_out 1 / R."""
        init_step(self.delta)
        for ones in (self.key_bias, self.query_bias, self.skip):
            nn.init.ones_(ones)
        if self.rank > 1:
            nn.init.ones_(self.mimo_gate)
            nn.init.constant_(self.mimo_value, 1 / self.rank)
            nn.init.constant_(self.mimo_out, 1 / self.rank)

    def flops(self, context: int) -> float:
        """Per token, besides the Linears: (1 + 4 R) H K V for decay, R writes and R reads, 2 R^2 H (K + V) for the
        correction inside a token (see `ops/mamba3.py`)."""
        R, K, V = self.rank, self.key_dim, self.value_dim
        return self.num_heads * ((1 + 4 * R) * K * V + 2 * R * R * (K + V))

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba3State:
        """The state before the first token: zeros. Device and (key's and value's) dtype default to the weights'."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide, H, K, V = torch.promote_types(dtype, torch.float32), self.num_heads, self.key_dim, self.value_dim
        return Mamba3State(
            torch.zeros(batch, H, self.pairs, device=device, dtype=wide),
            torch.zeros(batch, H, K, V, device=device, dtype=wide),
            torch.zeros(batch, self.rank, H, K, device=device, dtype=dtype),
            torch.zeros(batch, self.rank, H, V, device=device, dtype=dtype),
        )

    def step(self, x: Tensor, state: Mamba3State) -> Tensor:
        """As `DeltaMixer.step`."""
        y, after = self(x, state._replace(memory=at_least_float32(state.memory)))
        overwrite(state, after)
        return y

    def forward(
        self,
        x: Tensor,
        state: Mamba3State | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, Mamba3State | None]:
        """Mix the tokens of each sequence. Arguments, results and errors as for `GatedDeltaNet2.forward`."""
        check_kind(state, Mamba3State)
        N = count_sequences(x, self.d_model, cu_seqlens)
        if state is not None and state.angles.shape != (N, self.num_heads, self.pairs):
            expected = [N, self.num_heads, self.pairs]
            raise ValueError(f"the state's angles have shape {list(state.angles.shape)}; expected {expected}")
        z, u, B, C, dt, a, lam, phi = self.in_proj(x).split(self.widths, dim=-1)
        dt = F.softplus(dt.to(self.delta.dtype) + self.delta)
        rate = F.softplus(a.to(dt.dtype)).clamp(min=SMALLEST_RATE)
        half_turns = torch.tanh(phi.to(dt.dtype)).unsqueeze(-2) * dt.unsqueeze(-1)
        angles, last_angles = accumulate(half_turns, None if state is None else state.angles, cu_seqlens)
        ranks = (self.rank, self.key_dim)
        k = self.key_norm(B.unflatten(-1, ranks)).unsqueeze(-2) + self.key_bias
        q = self.query_norm(C.unflatten(-1, ranks)).unsqueeze(-2) + self.query_bias
        u, z = (t.unflatten(-1, (1, self.num_heads, self.value_dim)) for t in (u, z))
        v = u if self.rank == 1 else u * self.mimo_value.to(u.dtype)
        o, after = mamba3(
            rotate_pairs(q, angles.unsqueeze(2)).to(v.dtype),
            rotate_pairs(k, angles.unsqueeze(2)).to(v.dtype),
            v,
            -rate * dt,
            dt,
            torch.sigmoid(lam.to(dt.dtype)),
            initial_state=None if state is None else Mamba3Memory(*state[1:]),
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
        )
        o, z = o + self.skip[:, None] * v, at_least_float32(z)
        if self.rank == 1:
            o = o * F.silu(z)
        else:
            o = o * F.silu(z * self.mimo_gate) * self.mimo_out
        y = self.out_proj(o.sum(2).flatten(-2).to(u.dtype))
        return y, None if after is None else Mamba3State(last_angles, *after)


def accumulate(half_turns: Tensor, start: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Angles after each step, modulo 2 pi, and the last of each sequence.

    The sum is taken in float64: in float32 its error after 100,000 tokens would be as large as the steps. Its steps
    come in half turns: float32's pi is 3e-8 of itself too large, which would add up as they do.

    Args:
        half_turns: [B, T, H, pairs], steps in units of pi radians.
        start: [N, H, pairs] angles before the first step, in radians; None for zeros.
        cu_seqlens: [N + 1] offsets that pack N sequences into B = 1.

    Returns:
        [B, T, H, pairs] and [N, H, pairs] in radians and half_turns' dtype, at least float32.
    """
    total = math.pi * F.pad(half_turns.double().cumsum(1), (0, 0, 0, 0, 1, 0))  # [:, t] is the sum of the first t steps
    if cu_seqlens is None:
        angles = total if start is None else total + start.unsqueeze(1)
        angles, last = angles[:, 1:], angles[:, -1]
    else:
        offset = -total[0, cu_seqlens[:-1]] if start is None else start - total[0, cu_seqlens[:-1]]
        angles = total[:, 1:] + offset[sequence_of_token(cu_seqlens, half_turns.shape[1])]
        last = total[0, cu_seqlens[1:]] + offset
    dtype = torch.promote_types(half_turns.dtype, torch.float32)
    return angles.remainder(2 * math.pi).to(dtype), last.remainder(2 * math.pi).to(dtype)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channels 2i and 2i + 1 of x [..., K] by angles[..., i]; the channels beyond the pairs stay."""
    turned, rest = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], dim=-1)
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2), rest], dim=-1)
