"""The token mixer of Mamba-2 (Dao and Gu, arXiv 2405.21060)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.decay import Float32Parameters, init_rate, init_step
from gdn2.layers.linear import Linear, at_least_float32, check_sizes
from gdn2.layers.norm import RMSNorm
from gdn2.layers.state import Mamba2State, check_kind, count_sequences, overwrite
from gdn2.ops import gated_delta_rule_2
from gdn2.ops.rules import Rule
from gdn2.ops.short_conv import short_conv


class Mamba2(Float32Parameters):
    """Linear attention whose memory decays by one number per head and token, and is never erased.

        z, x, B, C, dt = in_proj(.);  x, B, C through the short convolution;  dt = softplus(dt + delta)
        S <- exp(-exp(rate) dt) S + B (dt x)^T        y = S^T C + skip x        out_proj(RMSNorm(y * SiLU(z)))

    One B and one C are shared by all heads. The norm is over all channels of all heads.

    Args:
        d_model: width of the input and output.
        num_heads: heads H, each with a memory of key_dim x value_dim.
        key_dim: channels K of B and C (the papers' d_state). value_dim: channels V of x per head (their head size).
        conv_width: taps of the short convolution, in tokens.
        norm_eps: epsilon of the output norm.

    Raises:
        ValueError: a size is below 1.
    """

    float32_parameters = ("rate", "delta", "skip")

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        key_dim: int = 64,
        value_dim: int = 64,
        conv_width: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim, conv_width=conv_width)
        self.d_model, self.num_heads, self.conv_width = d_model, num_heads, conv_width
        self.key_dim, self.value_dim = key_dim, value_dim
        values = num_heads * value_dim
        self.widths = [values, values + 2 * key_dim, num_heads]  # z; x, B and C; dt
        self.in_proj = Linear(d_model, sum(self.widths), bias=False)
        self.conv = nn.Parameter(torch.empty(self.widths[1], conv_width))
        self.rate = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.delta = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.skip = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.norm = RMSNorm(values, norm_eps)
        self.out_proj = Linear(values, d_model, bias=False)
        self._mark()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """rate = log U(1, 16); softplus(delta) log-uniform in [1e-3, 1e-1]; skip 1; conv within taps^-0.5."""
        init_rate(self.rate)
        init_step(self.delta)
        nn.init.ones_(self.skip)
        nn.init.uniform_(self.conv, -(self.conv_width**-0.5), self.conv_width**-0.5)

    def flops(self, context: int) -> float:
        """Per token, besides the Linears: the convolution, and 5 H K V for the recurrence (nothing read along e)."""
        return 2 * self.conv.numel() + 5 * self.num_heads * self.key_dim * self.value_dim

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        """The state before the first token: zeros. Device and (the tail's) dtype default to those of the weights."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return Mamba2State(
            torch.zeros(batch, self.conv_width - 1, self.widths[1], device=device, dtype=dtype),
            torch.zeros(
                batch, self.num_heads, self.key_dim, self.value_dim,
                device=device, dtype=torch.promote_types(dtype, torch.float32),
            ),
        )  # fmt: skip

    def step(self, x: Tensor, state: Mamba2State) -> Tensor:
        """As `DeltaMixer.step`."""
        y, after = self(x, state._replace(memory=at_least_float32(state.memory)))
        overwrite(state, after)
        return y

    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, Mamba2State | None]:
        """Mix the tokens of each sequence. Arguments, results and errors as for `GatedDeltaNet2.forward`."""
        check_kind(state, Mamba2State)
        count_sequences(x, self.d_model, cu_seqlens)
        z, u, dt = self.in_proj(x).split(self.widths, dim=-1)
        u, conv = short_conv(u, self.conv, None if state is None else state.conv, cu_seqlens, output_state)
        rule, inputs = self.rule(u, dt)
        o, memory = rule(
            *inputs, initial_state=None if state is None else state.memory, output_final_state=output_state,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = self.read_out(o, inputs[2], z, x.dtype)
        return y, None if conv is None or memory is None else Mamba2State(conv, memory)

    def rule(self, u: Tensor, dt: Tensor) -> tuple[Rule, tuple[Tensor, Tensor, Tensor, Tensor, None, Tensor]]:
        """The operator for convolved u [B, T, H V + 2 K] and projected dt [B, T, H], as `DeltaMixer.rule` has it."""
        v, k, q = u.split([self.num_heads * self.value_dim, self.key_dim, self.key_dim], dim=-1)
        q, k = (t.unsqueeze(2).expand(-1, -1, self.num_heads, -1) for t in (q, k))
        dt = F.softplus(dt.to(self.delta.dtype) + self.delta).unsqueeze(-1)
        decay = -self.rate.exp()[:, None] * dt
        v = v.unflatten(-1, (self.num_heads, self.value_dim))
        return partial(gated_delta_rule_2, scale=1.0), (q, k, v, decay, None, dt)

    def read_out(self, o: Tensor, v: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        """The operator's output o and its input v [B, T, H, V], gated by z [B, T, H V], as the mixer's output."""
        o = (o + self.skip[:, None] * v).flatten(-2)
        y: Tensor = self.out_proj(self.norm(o * F.silu(at_least_float32(z))).to(dtype))
        return y
