"""Sliding-window attention with rotary positions.

Three forms of the same thing. *Masked*: every query against every key, under a boolean mask. *Blocked*, for sequences
of many windows: with queries in blocks of W, all keys a query may see lie in its own block and the one before, so that
memory and work grow linearly with the sequence. *Flash*, on a GPU in 16 bits for sequences that start afresh: torch's
FlashAttention, which skips what lies outside the window or in another packed sequence, and builds no mask.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.few import few
from gdn2.layers.linear import Linear, at_least_float32
from gdn2.layers.norm import RMSNorm
from gdn2.layers.packed import Packed
from gdn2.layers.state import AttentionState, check_kind, count_sequences
from gdn2.ops.fused import fused, is_planning
from gdn2.ops.short_conv import sequence_of_token


class SlidingWindowAttention(nn.Module):
    """Multi-head softmax attention over the last `window` tokens, the token itself included; no biases.

    Args:
        d_model: width of the input and output.
        num_heads: heads; d_model / num_heads channels each, an even number, all of them rotated.
        window: keys each query sees, W; None means all of them, with a state that grows.
        rope_base, rope_scaling, rope_factor, rope_length: see `rotary_frequencies`. With "yarn" the logits grow by
            (1 + 0.1 ln factor)^2, which makes up for a softmax over more keys.

    Raises:
        ValueError: num_heads does not divide d_model into even heads, window is below 1, or an unknown rope_scaling.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        window: int | None = None,
        rope_base: float = 10_000.0,
        rope_scaling: str = "none",
        rope_factor: float = 1.0,
        rope_length: int = 4_096,
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % (2 * num_heads) != 0:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of d_model ({d_model}) into even heads")
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; expected at least 1, or None")
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        self.window, self.rope = window, (rope_base, rope_scaling, rope_factor, rope_length)
        rotary_frequencies(self.head_dim, *self.rope)  # refuses what does not fit
        self._made: Tensor | None = None
        self.scale: float | None = None  # the root of the head size
        if rope_scaling == "yarn":
            self.scale = self.head_dim**-0.5 * (1 + 0.1 * math.log(rope_factor)) ** 2
        self.q_proj = Linear(d_model, d_model, bias=False)
        self.k_proj = Linear(d_model, d_model, bias=False)
        self.v_proj = Linear(d_model, d_model, bias=False)
        self.out_proj = Linear(d_model, d_model, bias=False)
        self._packed: Packed | None = None

    def flops(self, context: int) -> float:
        """Per token, besides the Linears, the mean over `context` tokens: 2 d_model to score each key in sight, and 2
        d_model to add its value."""
        return 4 * self.d_model * mean_keys(context, self.window or context)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """The state before the first token. Device and dtype default to the weights'."""
        weight = self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        shape = (batch, self.window or 0, self.num_heads, self.head_dim)
        return AttentionState(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.int64),
        )

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, AttentionState | None]:
        """Attend within each sequence. Arguments, results and errors as for `GatedDeltaNet2.forward`."""
        check_kind(state, AttentionState)
        N = count_sequences(x, self.d_model, cu_seqlens)
        if state is not None:
            self._check_state(state, N)
        flash = state is None and has_flash(x, self.head_dim)
        alone = self.window is None and (output_state or not flash)
        if cu_seqlens is not None and (state is not None or alone):
            return self._one_by_one(x, state, cu_seqlens, output_state)
        T = x.shape[1]
        if cu_seqlens is None:
            starts, lengths = torch.arange(N, device=x.device) * T, torch.full((N,), T, device=x.device)
            document = None
            positions = torch.arange(T, device=x.device)[None]
            if state is not None:
                positions = positions + state.position[:, None]
        else:
            starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
            document = sequence_of_token(cu_seqlens, T)
            positions = (torch.arange(T, device=x.device) - starts[document])[None]
        heads = (self.num_heads, self.head_dim)
        angles = rotary_angles(positions, rotary_frequencies(self.head_dim, *self.rope, device=x.device))
        q = rotate(self.q_proj(x).unflatten(-1, heads), angles)
        k = rotate(self.k_proj(x).unflatten(-1, heads), angles)
        v = self.v_proj(x).unflatten(-1, heads)
        if state is not None:
            state = state._replace(keys=state.keys.to(k.dtype), values=state.values.to(v.dtype))

        if state is None and document is None and (self.window is None or self.window >= T):
            o = _sdpa(q, k, v, None, self.scale, is_causal=True)
        elif flash:
            o = _flash(q, k, v, cu_seqlens, self.window, self.scale)
        elif self.window is not None and 2 * self.window < T:
            o = _blocked(q, k, v, positions, document, state, self.window, self.scale)
        else:
            o = _masked(q, k, v, positions, document, state, self.window, self.scale)
        y = self.out_proj(o.flatten(-2))
        if not output_state:
            return y, None
        before = self.initial_state(N, x.device, k.dtype) if state is None else state
        capacity = before.keys.shape[1] + T if self.window is None else self.window
        return y, _remember(before, k, v, starts, lengths, capacity)

    def state_after(self, x: Tensor, position: int) -> AttentionState:
        """The state of sequences whose last inputs were x, the next of which stands at `position`.

        x [B, n, d_model], n = window or, without one, all `position` inputs; those before the first token count for
        nothing.
        """
        B, n = x.shape[:2]
        positions = torch.arange(position - n, position, device=x.device)
        angles = rotary_angles(positions[None], rotary_frequencies(self.head_dim, *self.rope, device=x.device))
        keys = rotate(self.k_proj(x).unflatten(-1, (self.num_heads, self.head_dim)), angles)
        values = self.v_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        slot = torch.arange(n, device=x.device)
        order = (slot - position) % max(n, 1)  # which input lies in each slot
        return AttentionState(keys[:, order], values[:, order], torch.full((B,), position, device=x.device))

    def step(self, x: Tensor, state: AttentionState) -> Tensor:
        """`forward` of one token [B, 1, d_model] of each sequence; `state` is written in place. No gradients.

        With full attention the state must have an empty slot left for every sequence: nothing here checks it, since
        that would wait for the GPU, and the oldest keys would be written over.
        """
        N, slots = x.shape[0], state.keys.shape[1]
        heads = (self.num_heads, self.head_dim)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if fused(q) and state.keys.dtype == state.values.dtype == q.dtype:
            return self.out_proj(self._attend(q[:, 0], k[:, 0], v[:, 0], state))
        positions = state.position[:, None]
        angles = rotary_angles(positions, rotary_frequencies(self.head_dim, *self.rope, device=x.device))
        q, k = rotate(q, angles), rotate(k, angles)
        where = torch.arange(N, device=x.device), state.position % slots
        state.keys.index_put_(where, k[:, 0].to(state.keys.dtype))
        state.values.index_put_(where, v[:, 0].to(state.values.dtype))
        state.position.add_(1)
        seen = _newest(state.position, slots) >= 0
        o = _sdpa(q, state.keys.to(q.dtype), state.values.to(q.dtype), seen[:, None], self.scale)
        return self.out_proj(o.flatten(-2))

    def pack(self) -> None:
        """Put the three projections side by side for `step_sum`, where they can be and are not yet."""
        self._packed = Packed.of(self._reads(), self._packed)

    def few(self, x: Tensor, state: AttentionState) -> bool:
        """Whether `step_sum` can take x and the state: few rows, on a GPU, after `pack`."""
        alike = state.keys.dtype == state.values.dtype == x.dtype
        packed = self._packed is not None and self._packed.holds(self._reads())
        return alike and packed and few(x, self.q_proj, self.out_proj)

    def step_sum(self, x: Tensor, norm: RMSNorm, state: AttentionState) -> Tensor:
        """x + step(norm(x), state), in four kernels; for what is `few`."""
        from gdn2.ops.kernels.project import project

        assert self._packed is not None
        projected = project(x, self._packed.matrix, norm=norm.weight, eps=norm.eps)
        q, k, v = projected.view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        return project(self._attend(q, k, v, state), self.out_proj.weight, added=x)

    def _reads(self) -> list[nn.Module]:
        """What reads the layer's input."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState) -> Tensor:
        """[N, 1, d_model] of one token's q, k, v [N, heads, head_dim] by the fused kernels."""
        from gdn2.ops.kernels.attend import attend

        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return attend(q, k, v, self._frequencies(q.device), *state, scale).flatten(1)[:, None]

    def _frequencies(self, device: torch.device) -> Tensor:
        """`rotary_frequencies` of this layer, made once for a device; for steps, which have no gradients."""
        if self._made is None or self._made.device != device:
            self._made = rotary_frequencies(self.head_dim, *self.rope, device=device)
        return self._made

    def _one_by_one(
        self, x: Tensor, state: AttentionState | None, cu_seqlens: Tensor, output_state: bool
    ) -> tuple[Tensor, AttentionState | None]:
        """Packed sequences that continue, or that look back without limit: each by itself."""
        cuts = cu_seqlens.tolist()
        outputs: list[Tensor] = []
        states: list[Any] = []
        for n, (start, end) in enumerate(pairwise(cuts)):
            row = None if state is None else AttentionState(*(t[n : n + 1] for t in state))
            y, after = SlidingWindowAttention.forward(self, x[:, start:end], row, output_state=output_state)
            outputs.append(y)
            states.append(after)
        if not output_state:
            return torch.cat(outputs, dim=1), None
        capacity = max(s.keys.shape[1] for s in states)
        parts = zip(*(_grown(s, capacity) for s in states))
        return torch.cat(outputs, dim=1), AttentionState(*(torch.cat(part) for part in parts))

    def _check_state(self, state: AttentionState, N: int) -> None:
        slots = state.keys.shape[1] if self.window is None else self.window
        expected = (N, slots, self.num_heads, self.head_dim)
        if state.keys.shape != expected or state.values.shape != expected or state.position.shape != (N,):
            raise ValueError(
                f"state has keys {list(state.keys.shape)}, values {list(state.values.shape)} and position "
                f"{list(state.position.shape)}; expected {list(expected)}, the same and [{N}]"
            )


def mean_keys(context: int, window: int) -> float:
    """Keys in sight of a query, the mean over a sequence: token t sees min(t, window) of them, itself included."""
    full = min(context, window)
    return (full * (full + 1) / 2 + (context - full) * window) / context


def rotary_frequencies(
    head_dim: int,
    base: float,
    scaling: str = "none",
    factor: float = 1.0,
    length: int = 4_096,
    device: torch.device | None = None,
) -> Tensor:
    """[head_dim / 2] float64, radians per token of each pair of channels: base^(-2i / head_dim), for texts `factor`
    times longer than in training changed by `scaling`:

    - "none": not at all.
    - "ntk": a larger base, base * factor^(d / (d - 2)): the slowest pair turns `factor` times slower, the fastest as
      before.
    - "yarn" (arXiv 2309.00071): pairs that turn 32 times and more over the `length` tokens of a training sequence stay;
      those that turn less than once are slowed by `factor`; in between the two are mixed linearly in the turns.

    ValueError for another scaling, a factor below 1 (with "none" other than 1), or ntk with heads of 2 channels.
    """
    if scaling not in ("none", "ntk", "yarn"):
        raise ValueError(f"rope_scaling is {scaling!r}; expected 'none', 'ntk' or 'yarn'")
    if not factor >= 1 or (scaling == "none" and factor != 1):
        raise ValueError(f"rope_factor is {factor}; expected at least 1, and 1 without rope_scaling")
    if scaling == "ntk":
        if head_dim == 2:
            raise ValueError("rope_scaling is 'ntk' with heads of 2 channels; expected 4 or more")
        base *= factor ** (head_dim / (head_dim - 2))
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    frequencies = base**-exponent
    if scaling == "yarn":
        turns = length * frequencies / (2 * math.pi)
        kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    return frequencies


def rotary_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """positions [B, T], frequencies [head_dim / 2] float64 -> angles [B, T, head_dim / 2] float32 in [0, 2 pi).

    The product and its remainder are taken in float64: in float32 the angle at position 1,000,000 would be off by 0.03.
    """
    return (positions[..., None] * frequencies).remainder(2 * math.pi).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel i with channel i + head_dim / 2; x [B, T, heads, head_dim], angles [B or 1, T, head_dim / 2]."""
    if fused(x):
        from gdn2.ops.kernels import rotary

        return rotary.rotate(x, angles)
    wide = at_least_float32(x)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    a, b = wide.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def has_flash(x: Tensor, head_dim: int) -> bool:
    """Whether queries, keys and values projected from x can go through `_flash`."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if not fused(x) or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 128:
        return False
    if is_planning() or kind != "cuda":
        return is_planning()
    from gdn2.ops.kernels.configs import has_flash_attention

    return has_flash_attention(x.device)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float | None
) -> Tensor:
    """q, k, v [B, T, heads, head_dim] in 16 bits; each sequence by itself, in its window or whole."""
    from torch.nn.attention.varlen import varlen_attn

    B, T = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (B + 1) * T, T, device=q.device)
    bounds = cu_seqlens.to(torch.int32)
    left = -1 if window is None else window - 1  # keys besides the query's own
    # The longest packed sequence is not known here without waiting for the GPU; T is a bound, and all that is asked.
    o = varlen_attn(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, bounds, T, T, scale=scale, window_size=(left, 0)
    )
    assert isinstance(o, Tensor)
    return o.unflatten(0, (B, T))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool = False) -> Tensor:
    """q, k, v [B, T, heads, head_dim]; mask [B or 1, queries, keys], true where a query sees a key."""
    mask = None if mask is None else mask[:, None]
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=is_causal, scale=scale
    )
    return o.transpose(1, 2)


def _newest(end: Tensor, slots: int) -> Tensor:
    """[N, slots]: the newest position below `end` [N] that falls in each slot; negative where none has."""
    slot = torch.arange(slots, device=end.device)
    return end[:, None] - 1 - (end[:, None] - 1 - slot) % max(slots, 1)


def _sees(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Positions of queries [..., Tq] and keys [..., Tk] (negative: an empty slot) -> mask [..., Tq, Tk]."""
    distance = query[..., :, None] - key[..., None, :]
    mask = (distance >= 0) & (key >= 0)[..., None, :]
    return mask if window is None else mask & (distance < window)


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    document: Tensor | None,
    state: AttentionState | None,
    window: int | None,
    scale: float | None = None,
) -> Tensor:
    """All queries against all keys: the state's, then the segment's own."""
    key_positions = positions
    if state is not None:
        key_positions = torch.cat([_newest(state.position, state.keys.shape[1]), positions], dim=1)
        k, v = torch.cat([state.keys, k], dim=1), torch.cat([state.values, v], dim=1)
    mask = _sees(positions, key_positions, window)
    if document is not None:
        mask = mask & (document[:, None] == document)
    return _sdpa(q, k, v, mask, scale)


def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    document: Tensor | None,
    state: AttentionState | None,
    W: int,
    scale: float | None = None,
) -> Tensor:
    """Queries in blocks of W against the keys of the block before and their own.

    The state's keys, oldest first, are the block before the first. The last block is filled up with tokens at a
    position so late that no real query sees them, while they see themselves: a softmax over nothing would be NaN.
    """
    B, T = q.shape[:2]
    fill = -T % W
    late = torch.iinfo(torch.int64).max // 2

    def blocks(x: Tensor, value: int = 0) -> Tensor:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, fill), value=value)
        return x.unflatten(1, (-1, W))

    def with_previous(first: Tensor, x: Tensor, value: int = 0) -> Tensor:
        own = blocks(x, value)
        return torch.cat([torch.cat([first[:, None], own[:, :-1]], dim=1), own], dim=2)

    if state is None:
        before = k.new_zeros(B, W, *k.shape[2:])
        key_blocks, value_blocks = with_previous(before, k), with_previous(before, v)
        past = positions.new_full((positions.shape[0], W), -1)
    else:
        order = (state.position[:, None] + torch.arange(W, device=q.device)) % W
        row = torch.arange(B, device=q.device)[:, None]
        key_blocks, value_blocks = with_previous(state.keys[row, order], k), with_previous(state.values[row, order], v)
        past = _newest(state.position, W)[row, order]
    mask = _sees(blocks(positions, late), with_previous(past, positions, late), W)
    if document is not None:
        own = document[None]
        mask = mask & (blocks(own)[..., :, None] == with_previous(torch.full_like(past, -1), own)[..., None, :])
    mask = mask.expand(B, *mask.shape[1:]).flatten(0, 1)
    o = _sdpa(blocks(q).flatten(0, 1), key_blocks.flatten(0, 1), value_blocks.flatten(0, 1), mask, scale)
    return o.unflatten(0, (B, -1)).flatten(1, 2)[:, :T]


def _grown(state: AttentionState, capacity: int) -> AttentionState:
    """The state with empty slots added up to `capacity`; for full attention, where a slot is a position."""
    more = (0, 0, 0, 0, 0, capacity - state.keys.shape[1])
    return state._replace(keys=F.pad(state.keys, more), values=F.pad(state.values, more))


def _remember(
    before: AttentionState, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, capacity: int
) -> AttentionState:
    """The state after a segment. Sequence n owns tokens starts[n] : starts[n] + lengths[n] of k and v, flattened."""
    if capacity > before.keys.shape[1]:
        before = _grown(before, capacity)
    N = starts.shape[0]
    position = before.position[:, None]
    end = before.position + lengths
    newest = _newest(end, capacity)
    old = torch.arange(N * capacity, device=k.device).view(N, capacity)
    row = torch.where(newest >= position, N * capacity + starts[:, None] + newest - position, old)

    def gather(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old.flatten(0, 1), new.flatten(0, 1)])[row]

    return AttentionState(gather(before.keys, k), gather(before.values, v), end)
