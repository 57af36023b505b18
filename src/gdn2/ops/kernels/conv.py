"""Causal depthwise short convolution with SiLU, forward and backward, over batches or packed sequences.

    u_t = sum_k taps[:, PAST - k] * x_{t-k}        y_t = silu(u_t)        k = 0 .. PAST,  PAST = width - 1

An input before the start of its sequence is the tail's, or zero. The backward computes u again from x:

    du_t = dy_t silu'(u_t)      dx_t = sum_k taps[:, PAST - k] * du_{t+k}      dtaps[:, PAST - k] = sum_t du_t x_{t-k}
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"
# ruff: noqa: RUF005  (Triton has no starred expressions)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.maths import sigmoid
from gdn2.ops.kernels.op import op
from gdn2.ops.kernels.run import INTERPRET, run

# `convolve`: channels and tokens per program, warps; `convolve_back`: channels, streams, tokens per stream, warps.
FORWARD = (128, 16, 4)
BACKWARD = (128, 4, 32, 4)
CHANNELS = 128  # of the kernels that touch nothing but the ends of sequences
INTERPRETED = (16, 16, 1), (16, 2, 8, 1)


@triton.jit
def rows_of(ptr, rows, mask, cols, D: tl.constexpr):
    """Rows of a matrix of D columns, zero outside the mask."""
    return tl.load(
        ptr + rows.to(tl.int64)[:, None] * D + cols[None, :], mask=mask[:, None] & (cols[None, :] < D), other=0.0
    )


@triton.jit
def place_of(t, T, position_ptr, sequence_ptr, inside, PACKED: tl.constexpr):
    """How many tokens of its sequence come before token t, and which sequence that is."""
    if PACKED:
        return tl.load(position_ptr + t, mask=inside, other=0), tl.load(sequence_ptr + t, mask=inside, other=0)
    else:
        return t % T, t // T


@triton.jit
def from_tail(tail_ptr, position, sequence, back: tl.constexpr, inside, cols, D: tl.constexpr, PAST: tl.constexpr):
    """The input `back` tokens before a token, where that lies before its sequence; zero elsewhere."""
    row = sequence * PAST + PAST + position - back
    return rows_of(tail_ptr, row, inside & (position < back), cols, D).to(tl.float32)


@triton.jit
def locate_tokens(starts_ptr, position_ptr, sequence_ptr, tokens, N, STEPS: tl.constexpr, BT: tl.constexpr):
    """`place_of` each packed token, by bisection: its sequence is the number of sequences that end at or before it.

    Starts that are no partition give some place, but one that exists.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    low, high = tl.zeros((BT,), tl.int32), tl.zeros((BT,), tl.int32) + N
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open = low < high
        ended = open & (tl.load(starts_ptr + 1 + middle, mask=open, other=0) <= t)
        high = tl.where(open & (ended == 0), middle, high)
        low = tl.where(ended, middle + 1, low)
    inside = t < tokens
    low = tl.minimum(low, N - 1)
    start = tl.load(starts_ptr + low, mask=inside, other=0)
    start = tl.minimum(tl.maximum(start, 0), t)
    tl.store(position_ptr + t, (t - start).to(tl.int32), mask=inside)
    tl.store(sequence_ptr + t, low, mask=inside)


@triton.jit
def convolve(
    x_ptr, taps_ptr, tail_ptr, position_ptr, sequence_ptr, y_ptr, tokens, T,
    D: tl.constexpr, WIDTH: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, PACKED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """y, BT tokens and BD channels at a time."""
    PARTS: tl.constexpr = (D + BD - 1) // BD
    PAST: tl.constexpr = WIDTH - 1
    t = tl.program_id(0) // PARTS * BT + tl.arange(0, BT)
    cols = tl.program_id(0) % PARTS * BD + tl.arange(0, BD)
    inside = t < tokens
    position, sequence = place_of(t, T, position_ptr, sequence_ptr, inside, PACKED)
    u = tl.zeros((BT, BD), tl.float32)
    for back in tl.static_range(WIDTH):
        x = rows_of(x_ptr, t - back, inside & (position >= back), cols, D).to(tl.float32)
        if TAIL:
            x += from_tail(tail_ptr, position, sequence, back, inside, cols, D, PAST)
        tap = tl.load(taps_ptr + cols * WIDTH + PAST - back, mask=cols < D, other=0.0).to(tl.float32)
        u += x * tap[None, :]
    y = (u * sigmoid(u, tl.float32)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + t.to(tl.int64)[:, None] * D + cols[None, :], y, mask=inside[:, None] & (cols[None, :] < D))


@triton.jit
def bounds_of(n, T, starts_ptr, PACKED: tl.constexpr):
    """First token of sequence n, and the first after it; within the T tokens, whatever the starts are."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(starts_ptr + n).to(tl.int64), 0), T)
        return start, tl.minimum(tl.maximum(tl.load(starts_ptr + n + 1).to(tl.int64), start), T)
    else:
        start = n.to(tl.int64) * T
        return start, start + T


@triton.jit
def carry_tail(
    x_ptr, tail_ptr, starts_ptr, out_ptr, T,
    D: tl.constexpr, PAST: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    PACKED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The tail that continues sequence n: its last PAST inputs, those of the old tail where it is shorter."""
    PARTS: tl.constexpr = (D + BD - 1) // BD
    n, cols = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * BD + tl.arange(0, BD)
    start, end = bounds_of(n, T, starts_ptr, PACKED)
    m = tl.arange(0, ROWS)
    token = end - PAST + m
    x = rows_of(x_ptr, token, (m < PAST) & (token >= start), cols, D).to(tl.float32)
    first = n.to(tl.int64) * PAST
    if TAIL:
        x += rows_of(tail_ptr, first + PAST + token - start, (m < PAST) & (token < start), cols, D).to(tl.float32)
    out = out_ptr + (first + m)[:, None] * D + cols[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=(m < PAST)[:, None] & (cols[None, :] < D))


@triton.jit
def tap_rows(taps_ptr, cols, D: tl.constexpr, WIDTH: tl.constexpr):
    """The taps by how many tokens back they look: a tuple of [1, BD]."""
    taps = ()
    for back in tl.static_range(WIDTH):
        tap = tl.load(taps_ptr + cols * WIDTH + WIDTH - 1 - back, mask=cols < D, other=0.0).to(tl.float32)
        taps = taps + (tap[None, :],)
    return taps


@triton.jit
def activation_gradient(dy, inputs, taps, WIDTH: tl.constexpr):
    """du = dy silu'(u)."""
    u = inputs[0] * taps[0]
    for back in tl.static_range(1, WIDTH):
        u += inputs[back] * taps[back]
    s = sigmoid(u, tl.float32)
    return dy * s * (1.0 + u * (1.0 - s))


@triton.jit
def walk_back(
    dy_ptr, x_ptr, taps_ptr, tail_ptr, position_ptr, sequence_ptr, dx_ptr, dtaps_ptr, tokens, T, last, cols,
    D: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr, PACKED: tl.constexpr, TAIL: tl.constexpr,
    STARTS: tl.constexpr,
):  # fmt: skip
    """dx of the LENGTH tokens before the last PAST of each stream, whose tokens end with `last`; and dtaps of them all.

    `recent` holds the inputs of the current token and of those before it, `pending` the unfinished dx of those tokens.
    Without STARTS no sequence starts, or has just started, among the tokens.
    """
    PAST: tl.constexpr = WIDTH - 1
    taps = tap_rows(taps_ptr, cols, D, WIDTH)
    nothing = tl.zeros((last.shape[0], cols.shape[0]), tl.float32)
    recent, pending, dtaps = (), (), (nothing,)
    for back in tl.static_range(PAST):
        recent = recent + (rows_of(x_ptr, last - back, last - back < tokens, cols, D),)
        pending = pending + (nothing,)
        dtaps = dtaps + (nothing,)
    dy = rows_of(dy_ptr, last, last < tokens, cols, D)
    x = rows_of(x_ptr, last - PAST, last - PAST < tokens, cols, D)

    for i in range(LENGTH + PAST):
        t = last - i
        # One step ahead, so that the loads are under way while this step is computed.
        next_dy = rows_of(dy_ptr, t - 1, (t >= 1) & (t - 1 < tokens), cols, D)
        oldest = t - 1 - PAST
        next_x = rows_of(x_ptr, oldest, (oldest >= 0) & (oldest < tokens), cols, D)
        recent = recent + (x,)
        inside = t < tokens
        inputs = ()
        if STARTS:
            position, sequence = place_of(t, T, position_ptr, sequence_ptr, inside, PACKED)
        for back in tl.static_range(WIDTH):
            value = recent[back].to(tl.float32)
            if STARTS:
                value = tl.where((position >= back)[:, None], value, 0.0)
                if TAIL:
                    value += from_tail(tail_ptr, position, sequence, back, inside, cols, D, PAST)
            inputs = inputs + (value,)
        du = activation_gradient(dy.to(tl.float32), inputs, taps, WIDTH)
        own = tl.where(i >= PAST, du, 0.0)
        pending = pending + (nothing,)
        dx, sums = (), ()
        for back in tl.static_range(WIDTH):
            reached = tl.where((position >= back)[:, None], du, 0.0) if STARTS else du
            dx = dx + (pending[back] + reached * taps[back],)
            sums = sums + (dtaps[back] + own * inputs[back],)
        mask = (inside & (i >= PAST))[:, None] & (cols[None, :] < D)
        tl.store(dx_ptr + t.to(tl.int64)[:, None] * D + cols[None, :], dx[0].to(dx_ptr.dtype.element_ty), mask=mask)
        pending, dtaps, recent = dx[1:], sums, recent[1:]
        dy, x = next_dy, next_x

    for back in tl.static_range(WIDTH):
        tl.store(dtaps_ptr + cols * WIDTH + PAST - back, tl.sum(dtaps[back], 0), mask=cols < D)


@triton.jit
def convolve_back(
    dy_ptr, x_ptr, taps_ptr, tail_ptr, position_ptr, sequence_ptr, dx_ptr, dtaps_ptr, tokens, T,
    D: tl.constexpr, WIDTH: tl.constexpr, BD: tl.constexpr, STREAMS: tl.constexpr, LENGTH: tl.constexpr,
    PACKED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dx of STREAMS runs of LENGTH tokens side by side, and their share of dtaps [programs, D, WIDTH]."""
    PARTS: tl.constexpr = (D + BD - 1) // BD
    PAST: tl.constexpr = WIDTH - 1
    block = tl.program_id(0) // PARTS
    cols = tl.program_id(0) % PARTS * BD + tl.arange(0, BD)
    last = (block * STREAMS + tl.arange(0, STREAMS)) * LENGTH + LENGTH + PAST - 1
    dtaps = dtaps_ptr + block.to(tl.int64) * D * WIDTH
    newest = tl.minimum((block + 1) * STREAMS * LENGTH + PAST, tokens) - 1
    position, _ = place_of(newest, T, position_ptr, sequence_ptr, newest >= 0, PACKED)
    if position >= newest - block * STREAMS * LENGTH + PAST:
        walk_back(
            dy_ptr, x_ptr, taps_ptr, tail_ptr, position_ptr, sequence_ptr, dx_ptr, dtaps, tokens, T, last, cols,
            D, WIDTH, LENGTH, PACKED, TAIL, False,
        )  # fmt: skip
    else:
        walk_back(
            dy_ptr, x_ptr, taps_ptr, tail_ptr, position_ptr, sequence_ptr, dx_ptr, dtaps, tokens, T, last, cols,
            D, WIDTH, LENGTH, PACKED, TAIL, True,
        )  # fmt: skip


@triton.jit
def tail_back(
    dy_ptr, x_ptr, taps_ptr, tail_ptr, dout_ptr, starts_ptr, dx_ptr, dtail_ptr, T,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    PACKED: tl.constexpr, TAIL: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Sequence n: the gradient of its tail, and what that of the tail it handed on (dout) adds to dx, after
    `convolve_back`."""
    PARTS: tl.constexpr = (D + BD - 1) // BD
    PAST: tl.constexpr = WIDTH - 1
    n, cols = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * BD + tl.arange(0, BD)
    start, end = bounds_of(n, T, starts_ptr, PACKED)
    first = n.to(tl.int64) * PAST
    m = tl.arange(0, ROWS)
    if OUT:
        token = end - PAST + m
        real = (m < PAST) & (token >= start)
        dx = rows_of(dx_ptr, token, real, cols, D).to(tl.float32)
        dx += rows_of(dout_ptr, first + m, real, cols, D).to(tl.float32)
        tl.store(
            dx_ptr + token[:, None] * D + cols[None, :], dx.to(dx_ptr.dtype.element_ty),
            mask=real[:, None] & (cols[None, :] < D),
        )  # fmt: skip
    if TAIL:
        taps = tap_rows(taps_ptr, cols, D, WIDTH)
        inside = (cols < D)[None, :]
        inputs = ()  # the tail, newest first
        for back in tl.static_range(PAST):
            row = tail_ptr + (first + PAST - 1 - back) * D + cols[None, :]
            inputs = inputs + (tl.load(row, mask=inside, other=0.0).to(tl.float32),)
        dtail = tl.zeros((ROWS, BD), tl.float32)
        if OUT:  # a sequence shorter than the tail hands a part of it on
            kept = m - (end - start)
            dtail += rows_of(dout_ptr, first + kept, (m < PAST) & (kept >= 0), cols, D).to(tl.float32)
        for position in tl.static_range(PAST):
            exists = inside & (start + position < end)
            at = (start + position) * D + cols[None, :]
            x = tl.load(x_ptr + at, mask=exists, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at, mask=exists, other=0.0).to(tl.float32)
            inputs = (x,) + inputs
            du = activation_gradient(dy, inputs, taps, WIDTH)
            for back in tl.static_range(position + 1, WIDTH):
                dtail += tl.where((m == PAST + position - back)[:, None], du * taps[back], 0.0)
            inputs = inputs[:PAST]
        out = dtail_ptr + (first + m)[:, None] * D + cols[None, :]
        tl.store(out, dtail.to(dtail_ptr.dtype.element_ty), mask=(m < PAST)[:, None] & inside)


def _places(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Starts of the packed sequences, and each token's position and sequence; Nones for a batch."""
    if cu_seqlens is None:
        return None, None, None
    tokens, N = x.shape[1], cu_seqlens.shape[0] - 1
    starts = cu_seqlens.to(x.device).contiguous()
    position, sequence = torch.empty(2, tokens, dtype=torch.int32, device=x.device)
    steps = 8 * triton.cdiv(N.bit_length(), 8)  # few values, so that few variants are compiled
    run(locate_tokens, triton.cdiv(tokens, 128), (starts, position, sequence, tokens, N), (steps, 128))
    return starts, position, sequence


def _few(D: int) -> int:
    return 16 if INTERPRET else min(CHANNELS, max(16, triton.next_power_of_2(D)))


@op("gdn2::short_conv")
def _short_conv(
    x: Tensor, weight: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None, output_tail: bool
) -> tuple[Tensor, Tensor]:
    (B, T, D), width = x.shape, weight.shape[1]
    N, past = B if cu_seqlens is None else cu_seqlens.shape[0] - 1, width - 1
    x, weight, tail = x.contiguous(), weight.contiguous(), None if tail is None else tail.contiguous()
    verdicts.demand(verdicts.AROUND, x.device)
    starts, position, sequence = _places(x, cu_seqlens)
    packed, has_tail = cu_seqlens is not None, tail is not None
    y = torch.empty_like(x)
    BD, BT, warps = INTERPRETED[0] if INTERPRET else FORWARD
    run(
        convolve, triton.cdiv(B * T, BT) * triton.cdiv(D, BD),
        (x, weight, tail, position, sequence, y, B * T, T), (D, width, BD, BT, packed, has_tail), warps,
    )  # fmt: skip
    after = x.new_empty((N, past, D) if output_tail else 0)
    if after.numel():
        BD = _few(D)
        run(
            carry_tail, N * triton.cdiv(D, BD), (x, tail, starts, after, T),
            (D, past, triton.next_power_of_2(past), BD, packed, has_tail),
        )  # fmt: skip
    return y, after


@_short_conv.register_fake
def _(
    x: Tensor, weight: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None, output_tail: bool
) -> tuple[Tensor, Tensor]:
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((N, weight.shape[1] - 1, x.shape[2]) if output_tail else 0)


@op("gdn2::short_conv_backward")
def _short_conv_backward(
    dy: Tensor, dout: Tensor, x: Tensor, weight: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and tail (empty without one); `dout` is empty when no tail was handed on."""
    (B, T, D), width = x.shape, weight.shape[1]
    N, past = B if cu_seqlens is None else cu_seqlens.shape[0] - 1, width - 1
    dy, dout, x, weight = dy.contiguous(), dout.contiguous(), x.contiguous(), weight.contiguous()
    tail = None if tail is None else tail.contiguous()
    starts, position, sequence = _places(x, cu_seqlens)
    packed, has_tail = cu_seqlens is not None, tail is not None
    dx, dtail = torch.empty_like(x), x.new_empty(0) if tail is None else torch.empty_like(tail)
    BD, streams, length, warps = INTERPRETED[1] if INTERPRET else BACKWARD
    blocks = triton.cdiv(B * T, streams * length)
    dtaps = torch.empty(blocks, D, width, dtype=torch.float32, device=x.device)
    run(
        convolve_back, blocks * triton.cdiv(D, BD),
        (dy, x, weight, tail, position, sequence, dx, dtaps, B * T, T),
        (D, width, BD, streams, length, packed, has_tail), warps,
    )  # fmt: skip
    if past and N and (has_tail or dout.numel()):
        BD = _few(D)
        run(
            tail_back, N * triton.cdiv(D, BD), (dy, x, weight, tail, dout, starts, dx, dtail, T),
            (D, width, triton.next_power_of_2(past), BD, packed, has_tail, dout.numel() > 0),
        )  # fmt: skip
    return dx, dtaps.sum(0).to(weight.dtype), dtail


@_short_conv_backward.register_fake
def _(
    dy: Tensor, dout: Tensor, x: Tensor, weight: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtail = x.new_empty(0) if tail is None else tail.new_empty(tail.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dtail


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, dy: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    dx, dweight, dtail = _short_conv_backward(dy, dout, *saved)
    return dx, dweight, None if saved[2] is None else dtail, None, None


_short_conv.register_autograd(_backward, setup_context=_setup)


def short_conv(
    x: Tensor, weight: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None, output_tail: bool
) -> tuple[Tensor, Tensor | None]:
    """`gdn2.ops.short_conv.short_conv` on checked arguments, tail in x's dtype; weight is used as it is."""
    y, after = _short_conv(x, weight, tail, cu_seqlens, output_tail)
    return y, after if output_tail else None
