"""One token of the whole mixer but for its projections: convolutions, gates, recurrence (9) and gated norm.

The state is the traffic: it is read once and written once, where it lies or to a new place. One kernel makes the few
vectors that the recurrence needs, once for all value heads of a key head; the other runs through the memory. Nothing
waits for the GPU, so that a CUDA graph can capture the step.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# ruff: noqa: RUF005  (Triton has no starred expressions)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.maths import sigmoid, softplus
from gdn2.ops.kernels.run import run
from gdn2.ops.projected import L2_EPS

TILE = 8192  # numbers of a memory in registers at a time, [K, TILE / K]: several programs then share a multiprocessor


class Token(NamedTuple):
    """What the layer projects for one token of N sequences, before any activation.

    q, k, f, b [N, H * K] for query, key, decay and erase; v, w, gate [N, HV * V] for value, write and output gate.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    f: Tensor
    b: Tensor
    w: Tensor
    gate: Tensor


class Weights(NamedTuple):
    """conv_q, conv_k [H * K, width], conv_v [HV * V, width], rate [H], delta [H * K], norm [V]."""

    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor
    rate: Tensor
    delta: Tensor
    norm: Tensor


class State(NamedTuple):
    """Tails conv_q, conv_k [rows, width - 1, H * K] and conv_v [rows, width - 1, HV * V] in the token's dtype, memory
    [rows, HV, K, V] float32, or bfloat16: then it is rounded once a token. A row belongs to one sequence."""

    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor
    memory: Tensor


@triton.jit
def load_tail(tail_ptr, taps_ptr, row, cols, mask, D: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr):
    """The past inputs [WP, cols] of a convolution, oldest first, and its taps."""
    m = tl.arange(0, WP)[:, None]
    inside = mask[None, :] & (m < WIDTH)
    old = tl.load(tail_ptr + (row * (WIDTH - 1) + m) * D + cols[None, :], mask=inside & (m < WIDTH - 1), other=0.0)
    return old, tl.load(taps_ptr + cols[None, :] * WIDTH + m, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_newest(x_ptr, cols, mask, WIDTH: tl.constexpr, WP: tl.constexpr):
    """The token's own input [WP, cols] after the past ones, which are zeros here; its channels begin at x."""
    m = tl.arange(0, WP)[:, None]
    return tl.load(x_ptr + cols[None, :] + 0 * m, mask=mask[None, :] & (m == WIDTH - 1), other=0.0)


@triton.jit
def convolve_token(tail, newest, out_ptr, row, cols, mask, D: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr):
    """The convolution's output for one token; its tail moves on by one input."""
    PAST: tl.constexpr = WIDTH - 1
    m = tl.arange(0, WP)[:, None]
    inputs = tl.where(m < PAST, tail[0], newest)
    u = tl.sum(inputs.to(tl.float32) * tail[1], 0)
    tl.debug_barrier()  # several threads may hold one number: all have read the old tail before one writes over it
    at = out_ptr + (row * PAST + m - 1) * D + cols[None, :]
    tl.store(at, inputs, mask=mask[None, :] & (m < WIDTH) & (m > 0))
    return u * sigmoid(u, tl.float32)


@triton.jit
def prepare_token(
    q_ptr, k_ptr, v_ptr, f_ptr, b_ptr, w_ptr, conv_q_ptr, conv_k_ptr, conv_v_ptr, rate_ptr, delta_ptr,
    tail_q_ptr, tail_k_ptr, tail_v_ptr, tail_q_out_ptr, tail_k_out_ptr, tail_v_out_ptr, slot_ptr, ready_ptr, z_ptr,
    scale, largest, l2_eps, stride_q, stride_k, stride_v, stride_f, stride_b, stride_w,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr,
    WP: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One key head: scale * q, k, exp(log-decay) and e into ready [N, 4, H, K]. Or one value head: z = w * v."""
    part, sequence = tl.program_id(0) % (H + HV), (tl.program_id(0) // (H + HV)).to(tl.int64)
    row = tl.load(slot_ptr + sequence).to(tl.int64) if SLOTS else sequence
    if part < H:
        keys = tl.arange(0, KP)
        is_key = keys < K
        key = part * K + keys
        q_ptr, k_ptr = q_ptr + sequence * stride_q, k_ptr + sequence * stride_k
        tail_q = load_tail(tail_q_ptr, conv_q_ptr, row, key, is_key, H * K, WIDTH, WP)
        new_q = load_newest(q_ptr, key, is_key, WIDTH, WP)
        tail_k = load_tail(tail_k_ptr, conv_k_ptr, row, key, is_key, H * K, WIDTH, WP)
        new_k = load_newest(k_ptr, key, is_key, WIDTH, WP)
        q = convolve_token(tail_q, new_q, tail_q_out_ptr, row, key, is_key, H * K, WIDTH, WP)
        k = convolve_token(tail_k, new_k, tail_k_out_ptr, row, key, is_key, H * K, WIDTH, WP)
        q *= tl.rsqrt(tl.sum(q * q) + l2_eps) * scale
        k *= tl.rsqrt(tl.sum(k * k) + l2_eps)
        step = tl.load(f_ptr + sequence * stride_f + key, mask=is_key, other=0.0).to(tl.float32)
        step += tl.load(delta_ptr + key, mask=is_key, other=0.0).to(tl.float32)
        alpha = tl.exp(-tl.exp(tl.load(rate_ptr + part).to(tl.float32)) * softplus(step, tl.float32))
        b = tl.load(b_ptr + sequence * stride_b + key, mask=is_key, other=0.0).to(tl.float32)
        ready = ready_ptr + 4 * sequence * H * K + key
        tl.store(ready, q, mask=is_key)
        tl.store(ready + H * K, k, mask=is_key)
        tl.store(ready + 2 * H * K, alpha, mask=is_key)
        tl.store(ready + 3 * H * K, k * largest * sigmoid(b, tl.float32), mask=is_key)
    else:
        values = tl.arange(0, VP)
        is_value = values < V
        value = (part - H) * V + values
        here = sequence * HV * V + value
        v_ptr += sequence * stride_v
        tail_v = load_tail(tail_v_ptr, conv_v_ptr, row, value, is_value, HV * V, WIDTH, WP)
        new_v = load_newest(v_ptr, value, is_value, WIDTH, WP)
        v = convolve_token(tail_v, new_v, tail_v_out_ptr, row, value, is_value, HV * V, WIDTH, WP)
        w = sigmoid(tl.load(w_ptr + sequence * stride_w + value, mask=is_value, other=0.0).to(tl.float32), tl.float32)
        tl.store(z_ptr + here, w * v, mask=is_value)


@triton.jit
def recur_token(
    ready_ptr, z_ptr, gate_ptr, norm_ptr, memory_ptr, memory_out_ptr, slot_ptr, y_ptr, norm_eps, stride_gate,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """One value head: the recurrence on its memory, BV value channels at a time, then the gated norm of its output."""
    sequence, value_head = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    row = tl.load(slot_ptr + sequence).to(tl.int64) if SLOTS else sequence
    keys = tl.arange(0, KP)
    is_key = keys < K
    ready = ready_ptr + (4 * sequence * H + value_head // (HV // H)) * K + keys
    q = tl.load(ready, mask=is_key, other=0.0)
    k = tl.load(ready + H * K, mask=is_key, other=0.0)
    alpha = tl.load(ready + 2 * H * K, mask=is_key, other=0.0)
    e = tl.load(ready + 3 * H * K, mask=is_key, other=0.0)
    first = (sequence * HV + value_head) * V
    outputs, squares = (), 0.0
    for begin in tl.static_range(0, V, BV):
        values = begin + tl.arange(0, BV)
        inside = is_key[:, None] & (values < V)[None, :]
        state = (row * HV + value_head) * K * V + keys[:, None] * V + values[None, :]
        S = tl.load(memory_ptr + state, mask=inside, other=0.0).to(tl.float32) * alpha[:, None]
        z = tl.load(z_ptr + first + values, mask=values < V, other=0.0)
        S += k[:, None] * (z - tl.sum(S * e[:, None], 0))[None, :]
        tl.store(memory_out_ptr + state, S.to(memory_out_ptr.dtype.element_ty), mask=inside)
        o = tl.sum(S * q[:, None], 0)
        squares += tl.sum(o * o)
        outputs = outputs + (o,)
    r = tl.rsqrt(squares / V + norm_eps)
    for part in tl.static_range((V + BV - 1) // BV):
        values = part * BV + tl.arange(0, BV)
        channels = sequence * stride_gate + value_head * V + values
        gate = tl.load(gate_ptr + channels, mask=values < V, other=0.0).to(tl.float32)
        weight = tl.load(norm_ptr + values, mask=values < V, other=0.0).to(tl.float32)
        y = outputs[part] * r * weight * gate * sigmoid(gate, tl.float32)
        tl.store(y_ptr + first + values, y.to(y_ptr.dtype.element_ty), mask=values < V)


def _launch(
    token: Token, weights: Weights, state: State, out: State, slots: Tensor | None,
    scale: float, largest: float, norm_eps: float,
) -> Tensor:  # fmt: skip
    H, V, width = weights.rate.shape[0], weights.norm.shape[0], weights.conv_q.shape[1]
    N, K, HV = token.k.shape[0], token.k.shape[1] // H, token.v.shape[1] // V
    verdicts.demand(verdicts.DECODE, token.k.device)
    token = Token(*(x if x.stride(1) == 1 else x.contiguous() for x in token))  # rows of a wider tensor stay there
    weights = Weights(*(x.contiguous() for x in weights))
    slots = None if slots is None else slots.contiguous()
    strides = [x.stride(0) for x in token]
    ready = torch.empty(N, 4, H, K, dtype=torch.float32, device=token.k.device)
    z = torch.empty(N, HV, V, dtype=torch.float32, device=token.k.device)
    y = token.gate.new_empty(token.gate.shape)
    KP, VP, WP = (triton.next_power_of_2(size) for size in (K, V, width))
    run(
        prepare_token, N * (H + HV),
        (*token[:6], *weights[:5], *state[:3], *out[:3], slots, ready, z, scale, largest, L2_EPS, *strides[:6]),
        (H, HV, K, V, width, WP, KP, VP, slots is not None), 2,
    )  # fmt: skip
    run(
        recur_token, N * HV,
        (ready, z, token.gate, weights.norm, state.memory, out.memory, slots, y, norm_eps, strides[6]),
        (H, HV, K, V, KP, min(VP, max(16, TILE // KP)), slots is not None), 4,
    )  # fmt: skip
    return y


@torch.library.custom_op("gdn2::decode", mutates_args=())
def _decode(
    token: list[Tensor], weights: list[Tensor], state: list[Tensor], scale: float, largest: float, norm_eps: float
) -> list[Tensor]:
    before = State(*(x.contiguous() for x in state))
    after = State(*(torch.empty_like(x) for x in before))
    return [_launch(Token(*token), Weights(*weights), before, after, None, scale, largest, norm_eps), *after]


@_decode.register_fake
def _(
    token: list[Tensor], weights: list[Tensor], state: list[Tensor], scale: float, largest: float, norm_eps: float
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (token[-1], *state)]


@torch.library.custom_op("gdn2::decode_in_place", mutates_args=("pool",))
def _decode_in_place(
    token: list[Tensor], weights: list[Tensor], pool: list[Tensor], slots: Tensor | None, scale: float, largest: float,
    norm_eps: float,
) -> Tensor:  # fmt: skip
    where = State(*pool)
    return _launch(Token(*token), Weights(*weights), where, where, slots, scale, largest, norm_eps)


@_decode_in_place.register_fake
def _(
    token: list[Tensor], weights: list[Tensor], pool: list[Tensor], slots: Tensor | None, scale: float, largest: float,
    norm_eps: float,
) -> Tensor:  # fmt: skip
    return token[-1].new_empty(token[-1].shape)


def decode(
    token: Token, weights: Weights, state: State, *, scale: float, largest_erase: float, norm_eps: float
) -> tuple[Tensor, State]:
    """y [N, HV * V] in the gate's dtype, and the state after the token; row n belongs to sequence n.

    No gradients. ValueError for shapes and dtypes that do not fit.
    """
    check(token, weights, state, token.k.shape[0])
    y, *after = _decode(list(token), list(weights), list(state), scale, largest_erase, norm_eps)
    return y, State(*after)


def decode_in_place(
    token: Token, weights: Weights, pool: State, slots: Tensor | None = None, *, scale: float, largest_erase: float,
    norm_eps: float,
) -> Tensor:  # fmt: skip
    """As `decode`, on a pool of states: sequence n lives in row slots[n], which is updated; no row may occur twice.

    slots [N] int32 or int64; None for row n. ValueError also for a pool that is not contiguous.
    """
    check(token, weights, pool, token.k.shape[0] if slots is None else pool.memory.shape[0])
    if slots is not None and (slots.shape != token.k.shape[:1] or slots.dtype not in (torch.int32, torch.int64)):
        found = f"slots is {slots.dtype} of shape {list(slots.shape)}"
        raise ValueError(f"{found}; expected int32 or int64 of shape {list(token.k.shape[:1])}")
    check_contiguous(pool)
    return _decode_in_place(list(token), list(weights), list(pool), slots, scale, largest_erase, norm_eps)


def check_contiguous(pool: State) -> None:
    """ValueError for a state that cannot be written in place."""
    for name, x in zip(State._fields, pool):
        if not x.is_contiguous():
            raise ValueError(f"{name} of the pool has strides {x.stride()}; expected it contiguous")


def check(token: Token, weights: Weights, state: State, rows: int) -> None:
    """ValueError for shapes and dtypes that do not fit; `rows` is how many the state should have."""
    H, V, width = weights.rate.shape[0], weights.norm.shape[0], weights.conv_q.shape[-1]
    N, keys, values = token.k.shape[0], token.k.shape[-1], token.v.shape[-1]
    if keys % H or values % (V * H):
        raise ValueError(f"k has {keys} and v {values} channels; expected multiples of {H} (heads) and {V * H}")
    past, memory = width - 1, (rows, values // V, keys // H, V)
    shapes: tuple[tuple[Token | Weights | State, list[tuple[int, ...]]], ...] = (
        (token, [(N, keys), (N, keys), (N, values), (N, keys), (N, keys), (N, values), (N, values)]),
        (weights, [(keys, width), (keys, width), (values, width), (H,), (keys,), (V,)]),
        (state, [(rows, past, keys), (rows, past, keys), (rows, past, values), memory]),
    )
    for part, expected in shapes:
        for name, x, shape in zip(part._fields, part, expected):
            if x.shape != shape:
                raise ValueError(f"{name} has shape {list(x.shape)}; expected {list(shape)}")
    for name, x, dtype in zip(State._fields, state, [token.q.dtype, token.k.dtype, token.v.dtype, torch.float32]):
        if x.dtype != dtype and (name, x.dtype) != ("memory", torch.bfloat16):
            raise ValueError(f"{name} of the state has dtype {x.dtype}; expected {dtype}")
