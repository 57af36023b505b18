"""The token mixer of every delta rule, and with its own gates that of Gated DeltaNet-2 (Figure 1, right)."""

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from gdn2.layers.few import few
from gdn2.layers.gates import ChannelGates, Gates
from gdn2.layers.linear import Linear, at_least_float32, check_sizes, low_rank
from gdn2.layers.norm import GatedRMSNorm, RMSNorm, l2_norm
from gdn2.layers.packed import Packed
from gdn2.layers.state import DeltaState, check_kind, count_sequences, overwrite
from gdn2.ops import gated_delta_rule_2
from gdn2.ops.fused import fused
from gdn2.ops.projected import rule_from_projections
from gdn2.ops.rules import Rule
from gdn2.ops.short_conv import short_conv

if TYPE_CHECKING:
    from gdn2.ops.kernels.decode import Token, Weights
    from gdn2.ops.kernels.mix import LowRank


class DeltaMixer(nn.Module):
    """Linear attention whose memory erases before it writes; a subclass adds `gates` and what follows the operator.

    q, k and v are projected, convolved over a few tokens and passed through SiLU; q and k have length 1 per head; the
    operator reads and updates the memory; its output is normalised per value head and gated.

    A subclass sets `gates`, `output_gate` (x -> the pre-activation of the output's gate), `norm` and `out_proj`, in
    this order, then calls `reset_parameters`.

    Args:
        d_model: width of the input and output.
        num_heads: key heads H. num_value_heads: value heads HV, a multiple of H (default H); value head j uses the
            query, key, decay and erase gate of key head j // (HV // H).
        key_dim, value_dim: channels per head, K and V. The memory of a value head is a [K, V] matrix.
        conv_width: taps of the short convolution, in tokens.

    Raises:
        ValueError: num_value_heads is not a multiple of num_heads, or a size is below 1.
    """

    gates: Gates
    output_gate: nn.Module
    norm: nn.Module
    out_proj: Linear

    def __init__(
        self, d_model: int, num_heads: int, num_value_heads: int | None, key_dim: int, value_dim: int, conv_width: int
    ) -> None:
        super().__init__()
        num_value_heads = num_heads if num_value_heads is None else num_value_heads
        check_sizes(
            d_model=d_model, num_heads=num_heads, num_value_heads=num_value_heads, key_dim=key_dim,
            value_dim=value_dim, conv_width=conv_width,
        )  # fmt: skip
        if num_value_heads % num_heads != 0:
            raise ValueError(f"num_value_heads is {num_value_heads}; expected a multiple of num_heads ({num_heads})")
        self.d_model, self.num_heads, self.num_value_heads = d_model, num_heads, num_value_heads
        self.key_dim, self.value_dim, self.conv_width = key_dim, value_dim, conv_width
        keys, values = num_heads * key_dim, num_value_heads * value_dim
        self.q_proj = Linear(d_model, keys, bias=False)
        self.k_proj = Linear(d_model, keys, bias=False)
        self.v_proj = Linear(d_model, values, bias=False)
        self.conv_q = nn.Parameter(torch.empty(keys, conv_width))
        self.conv_k = nn.Parameter(torch.empty(keys, conv_width))
        self.conv_v = nn.Parameter(torch.empty(values, conv_width))

    def reset_parameters(self) -> None:
        """Convolutions start as torch's own do, uniform within 1 / sqrt(taps); the parts initialise themselves."""
        bound = self.conv_width**-0.5
        for weight in (self.conv_q, self.conv_k, self.conv_v):
            nn.init.uniform_(weight, -bound, bound)

    def flops(self, context: int) -> float:
        """Per token, besides the Linears: the convolutions, and 7 HV K V for the recurrence itself (the chunkwise form
        spends more, to do it as matrix products): decay 1, reading along e 2, writing 2, reading along q 2."""
        taps = self.conv_q.numel() + self.conv_k.numel() + self.conv_v.numel()
        return 2 * taps + 7 * self.num_value_heads * self.key_dim * self.value_dim

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DeltaState:
        """The state before the first token: zeros. Device and (the tails') dtype default to those of the weights."""
        weight = self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        keys, values = self.num_heads * self.key_dim, self.num_value_heads * self.value_dim

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        past = self.conv_width - 1
        memory = zeros(
            self.num_value_heads, self.key_dim, self.value_dim, dtype=torch.promote_types(dtype, torch.float32)
        )
        return DeltaState(zeros(past, keys), zeros(past, keys), zeros(past, values), memory)

    def forward(
        self,
        x: Tensor,
        state: DeltaState | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, DeltaState | None]:
        """Mix the tokens of each sequence.

        Args:
            x: [B, T, d_model].
            state: one row per sequence, what an earlier call returned; None starts afresh.
            cu_seqlens: [N + 1] token offsets that pack N sequences into B = 1.
            output_state: without it the returned state is None, and its cost is saved.

        Returns:
            y [B, T, d_model] and the state after the last token of each sequence.

        Raises:
            ValueError: shapes that do not fit.
        """
        check_kind(state, DeltaState)
        count_sequences(x, self.d_model, cu_seqlens)
        tails = (None, None, None) if state is None else state[:3]
        (q, k, v), after = self.convolve(x, tails, cu_seqlens, output_state)
        rule, inputs = self.rule(q, k, v, x)
        o, memory = rule(
            *inputs, initial_state=None if state is None else state.memory, output_final_state=output_state,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = self.out_proj(self.read_out(o, x).flatten(-2))
        if after is None or memory is None:
            return y, None
        return y, DeltaState(*after, memory)

    def convolve(
        self,
        x: Tensor,
        tails: tuple[Tensor | None, Tensor | None, Tensor | None],
        cu_seqlens: Tensor | None,
        output_tails: bool,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor] | None]:
        """q, k [B, T, H, K] and v [B, T, HV, V] of x [B, T, d_model] after the short convolutions, and their tails."""
        q, conv_q = short_conv(self.q_proj(x), self.conv_q, tails[0], cu_seqlens, output_tails)
        k, conv_k = short_conv(self.k_proj(x), self.conv_k, tails[1], cu_seqlens, output_tails)
        v, conv_v = short_conv(self.v_proj(x), self.conv_v, tails[2], cu_seqlens, output_tails)
        q, k = (y.unflatten(-1, (self.num_heads, self.key_dim)) for y in (q, k))
        v = v.unflatten(-1, (self.num_value_heads, self.value_dim))
        if conv_q is None or conv_k is None or conv_v is None:
            return (q, k, v), None
        return (q, k, v), (conv_q, conv_k, conv_v)

    def rule(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> tuple[Rule, tuple[Tensor | None, ...]]:
        """The operator for convolved q, k, v and gates of x, and its inputs: q, k, v, decay, erase, write and others.

        It takes initial_state, output_final_state and cu_seqlens besides.
        """
        if not self.gates.plain:
            return gated_delta_rule_2, (l2_norm(q), l2_norm(k), v, *self.gates(x))
        rule = partial(
            rule_from_projections, largest_erase=self.gates.largest_erase, largest_write=self.gates.largest_write
        )
        return rule, (q, k, v, *self.gates.project(x), *self.gates.decay_parameters())

    def step(self, x: Tensor, state: DeltaState) -> Tensor:
        """`forward` of one token [B, 1, d_model] of each sequence; `state` is written in place. No gradients."""
        y, after = self(x, state._replace(memory=at_least_float32(state.memory)))
        overwrite(state, after)
        return y

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """The operator's output [B, T, HV, V], normalised and gated by x [B, T, d_model]."""
        gated: Tensor = self.norm(o, self.output_gate(x).unflatten(-1, (self.num_value_heads, self.value_dim)))
        return gated


class GatedDeltaNet2(DeltaMixer):
    """The delta rule with separate channel-wise gates for decaying, erasing and writing (8-12).

    Args:
        d_model, num_heads, num_value_heads, key_dim, value_dim, conv_width: as for `DeltaMixer`.
        negative_eigenvalues: let the erase gate reach 2, so that the transition can reflect as well as shrink.
        norm_eps: epsilon of the output norm.
        channel_erase, channel_write: without it that gate is averaged over the channels of its head (Table 5).
        decay_lower_bound: a log-decay in nats, below 0, that none goes beneath; None for no bound. See `DecayGate`.

    Raises:
        ValueError: num_value_heads is not a multiple of num_heads, a size is below 1, or the bound is not below 0.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_value_heads: int | None = None,
        key_dim: int = 128,
        value_dim: int = 128,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        channel_erase: bool = True,
        channel_write: bool = True,
        decay_lower_bound: float | None = None,
    ) -> None:
        super().__init__(d_model, num_heads, num_value_heads, key_dim, value_dim, conv_width)
        HV = self.num_value_heads
        self.gates: ChannelGates = ChannelGates(
            d_model, num_heads, HV, key_dim, value_dim, negative_eigenvalues, channel_erase, channel_write,
            decay_lower_bound,
        )  # fmt: skip
        self.output_gate: nn.Sequential = low_rank(d_model, value_dim, HV * value_dim, bias=True)
        self.norm: GatedRMSNorm = GatedRMSNorm(value_dim, norm_eps)
        self.out_proj = Linear(HV * value_dim, d_model, bias=False)
        self._packed: Packed | None = None
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: DeltaState | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, DeltaState | None]:
        """As `DeltaMixer.forward`; a decoding step on a GPU is one kernel."""
        one = state is not None and x.ndim == 3 and x.shape[1] == 1 and cu_seqlens is None
        if state is not None and one and self.gates.plain and not torch.is_grad_enabled() and fused(x):
            check_kind(state, DeltaState)
            count_sequences(x, self.d_model, cu_seqlens)
            y, after = self._step(x, state)
            return y, after if output_state else None
        return super().forward(x, state, cu_seqlens, output_state)

    def step(self, x: Tensor, state: DeltaState) -> Tensor:
        """As `DeltaMixer.step`; on a GPU one kernel that reads and writes the memory once."""
        if not (self.gates.plain and fused(x)):
            return super().step(x, state)
        from gdn2.ops.kernels import decode

        check_kind(state, DeltaState)
        token, weights = self._projected(x)
        y = decode.decode_in_place(token, weights, decode.State(*state), None, **self._options())
        return self.out_proj(y).unsqueeze(1)

    def few(self, x: Tensor, state: DeltaState) -> bool:
        """Whether `step_sum` can take x and the state: few rows, on a GPU, after `pack`, heads as `mix` takes them."""
        packed = self._packed is not None and self._packed.holds(self._reads())
        if not (packed and self.gates.plain and few(x, self.q_proj, self.out_proj)):
            return False
        from gdn2.ops.kernels import decode, mix

        return mix.fits(decode.State(*state), self._low_rank())

    def step_sum(self, x: Tensor, norm: RMSNorm, state: DeltaState) -> Tensor:
        """x + step(norm(x), state), in three kernels; for what is `few`."""
        from gdn2.ops.kernels import decode, mix
        from gdn2.ops.kernels.project import project

        check_kind(state, DeltaState)
        assert self._packed is not None
        projected = project(x, self._packed.matrix, norm=norm.weight, eps=norm.eps).flatten(1)
        y = mix.mix(projected, self._low_rank(), self._weights(), decode.State(*state), **self._options())
        return project(y.unsqueeze(1), self.out_proj.weight, added=x)

    def pack(self) -> None:
        """Put all that reads the layer's input side by side for the fused step, where it can be and is not yet."""
        self._packed = Packed.of(self._reads(), self._packed)

    def _reads(self) -> list[nn.Module]:
        """What reads the layer's input."""
        low_decay, low_gate = cast(nn.Sequential, self.gates.decay.projection)[0], self.output_gate[0]
        return [self.q_proj, self.k_proj, self.v_proj, self.gates.erase, self.gates.write, low_decay, low_gate]

    def _step(self, x: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        """`forward` of one token [B, 1, d_model], fused between the projections."""
        from gdn2.ops.kernels import decode

        token, weights = self._projected(x)
        conv_q, conv_k, conv_v = (tail.to(p.dtype) for tail, p in zip(state[:3], token))
        before = decode.State(conv_q, conv_k, conv_v, state.memory)
        y, after = decode.decode(token, weights, before, **self._options())
        return self.out_proj(y).unsqueeze(1), DeltaState(*after)

    def _projected(self, x: Tensor) -> "tuple[Token, Weights]":
        """What the fused step takes of one token [B, 1, d_model] and of this layer."""
        from gdn2.ops.kernels import decode

        decay = self.gates.decay
        if self._packed is None or not self._packed.holds(self._reads()):
            projected = self.q_proj(x), self.k_proj(x), self.v_proj(x), *self.gates.project(x), self.output_gate(x)
        else:
            q, k, v, b, w, low_f, low_gate = self._packed(x)
            f, gate = cast(nn.Sequential, decay.projection)[1](low_f), self.output_gate[1](low_gate)
            projected = q, k, v, f, b, w, gate
        return decode.Token(*(p.flatten(1) for p in projected)), self._weights()

    def _weights(self) -> "Weights":
        from gdn2.ops.kernels import decode

        decay = self.gates.decay
        return decode.Weights(self.conv_q, self.conv_k, self.conv_v, decay.rate, decay.delta, self.norm.weight)

    def _low_rank(self) -> "LowRank":
        from gdn2.ops.kernels import mix

        f, gate = cast(nn.Sequential, self.gates.decay.projection)[1], cast(nn.Linear, self.output_gate[1])
        return mix.LowRank(cast(nn.Linear, f).weight, gate.weight, gate.bias)

    def _options(self) -> dict[str, float]:
        return {
            "scale": self.key_dim**-0.5,
            "largest_erase": self.gates.largest_erase,
            "norm_eps": self.norm.eps,
        }
