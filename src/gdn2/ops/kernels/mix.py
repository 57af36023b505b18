"""One token of the whole mixer between its two large products, one kernel: for few sequences, and as many value heads
as key heads.

A program has a head to itself: the second halves of the low-rank projections, convolutions, gates, recurrence (9) and
gated norm. What the products before it do not make, the memory above all, is on its way before they are done.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.decode import (
    State,
    Token,
    Weights,
    check,
    check_contiguous,
    convolve_token,
    load_newest,
    load_tail,
)
from gdn2.ops.kernels.early import begin_early, wait_for_inputs
from gdn2.ops.kernels.maths import sigmoid, softplus
from gdn2.ops.kernels.run import run
from gdn2.ops.projected import L2_EPS

MOST_NUMBERS = 16_384  # of a memory, or of a head's part of a low-rank projection: they lie in a program's registers
WARPS = 8


class LowRank(NamedTuple):
    """The second halves of the low-rank projections: f [H * K, R] of the decay, gate [H * V, R] of the output gate and
    its bias [H * V]."""

    f: Tensor
    gate: Tensor
    bias: Tensor


@triton.jit
def mix_token(
    x_ptr, f_ptr, gate_ptr, bias_ptr, conv_q_ptr, conv_k_ptr, conv_v_ptr, rate_ptr, delta_ptr, norm_ptr,
    tail_q_ptr, tail_k_ptr, tail_v_ptr, memory_ptr, y_ptr, scale, largest, l2_eps, norm_eps,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, RP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one sequence; x [N, 3 H K + 2 H V + 2 R] holds q, k, v, b, w and the low ranks of f and the gate."""
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    keys, values, ranks = tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, RP)
    is_key, is_value, is_rank = keys < K, values < V, ranks < R
    key, value = head * K + keys, head * V + values
    S_at = (row * H + head) * K * V + keys[:, None] * V + values[None, :]
    inside = is_key[:, None] & is_value[None, :]
    S = tl.load(memory_ptr + S_at, mask=inside, other=0.0)
    f_rows = tl.load(f_ptr + key[:, None] * R + ranks[None, :], mask=is_key[:, None] & is_rank[None, :], other=0.0)
    gate_rows = tl.load(
        gate_ptr + value[:, None] * R + ranks[None, :], mask=is_value[:, None] & is_rank[None, :], other=0.0
    )
    tail_q = load_tail(tail_q_ptr, conv_q_ptr, row, key, is_key, H * K, WIDTH, WP)
    tail_k = load_tail(tail_k_ptr, conv_k_ptr, row, key, is_key, H * K, WIDTH, WP)
    tail_v = load_tail(tail_v_ptr, conv_v_ptr, row, value, is_value, H * V, WIDTH, WP)
    delta = tl.load(delta_ptr + key, mask=is_key, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + value, mask=is_value, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + values, mask=is_value, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(rate_ptr + head).to(tl.float32))
    wait_for_inputs(EARLY)

    x = x_ptr + row * (3 * H * K + 2 * H * V + 2 * R)
    after_v = x + 2 * H * K + H * V
    after_w = after_v + H * K + H * V
    low_f = tl.load(after_w + ranks, mask=is_rank, other=0.0).to(tl.float32)
    low_gate = tl.load(after_w + R + ranks, mask=is_rank, other=0.0).to(tl.float32)
    b = tl.load(after_v + key, mask=is_key, other=0.0).to(tl.float32)
    w = tl.load(after_v + H * K + value, mask=is_value, other=0.0).to(tl.float32)
    new_q = load_newest(x, key, is_key, WIDTH, WP)
    new_k = load_newest(x + H * K, key, is_key, WIDTH, WP)
    new_v = load_newest(x + 2 * H * K, value, is_value, WIDTH, WP)
    q = convolve_token(tail_q, new_q, tail_q_ptr, row, key, is_key, H * K, WIDTH, WP)
    k = convolve_token(tail_k, new_k, tail_k_ptr, row, key, is_key, H * K, WIDTH, WP)
    v = convolve_token(tail_v, new_v, tail_v_ptr, row, value, is_value, H * V, WIDTH, WP)
    f = tl.sum(f_rows.to(tl.float32) * low_f[None, :], 1) + delta
    gate = tl.sum(gate_rows.to(tl.float32) * low_gate[None, :], 1) + bias
    q *= tl.rsqrt(tl.sum(q * q) + l2_eps) * scale
    k *= tl.rsqrt(tl.sum(k * k) + l2_eps)
    alpha = tl.exp(-rate * softplus(f, tl.float32))
    e = k * largest * sigmoid(b, tl.float32)
    S = S.to(tl.float32) * alpha[:, None]
    S += k[:, None] * (sigmoid(w, tl.float32) * v - tl.sum(S * e[:, None], 0))[None, :]
    tl.store(memory_ptr + S_at, S.to(memory_ptr.dtype.element_ty), mask=inside)
    o = tl.sum(S * q[:, None], 0)
    y = o * tl.rsqrt(tl.sum(o * o) / V + norm_eps) * weight * gate * sigmoid(gate, tl.float32)
    tl.store(y_ptr + row * H * V + value, y.to(y_ptr.dtype.element_ty), mask=is_value)


def fits(pool: State, low: LowRank) -> bool:
    """Whether `mix` takes a state of these shapes."""
    HV, K, V = pool.memory.shape[1:]
    grouped = pool.conv_k.shape[2] != HV * K
    R = triton.next_power_of_2(low.f.shape[1])
    K, V = triton.next_power_of_2(K), triton.next_power_of_2(V)
    return not grouped and max(K * V, K * R, V * R) <= MOST_NUMBERS


def mix(
    x: Tensor, low: LowRank, weights: Weights, pool: State, *, scale: float, largest_erase: float, norm_eps: float
) -> Tensor:
    """y [N, H * V] in x's dtype of one token of N sequences, whose states `pool` are updated, for what `fits`.

    x [N, 3 H K + 2 H V + 2 R]: what the layer projects of the token, before any activation: q, k, v, erase, write, and
    the low ranks of decay and output gate. No gradients. ValueError for shapes and dtypes that do not fit.
    """
    H, V, width = weights.rate.shape[0], weights.norm.shape[0], weights.conv_q.shape[1]
    N, K, R = x.shape[0], weights.conv_q.shape[0] // H, low.f.shape[1]
    _check(x, low, weights, pool, (H * K, H * V, R))
    verdicts.demand(verdicts.DECODE, x.device)
    x, low, weights = x.contiguous(), [t.contiguous() for t in low], [t.contiguous() for t in weights]
    y = x.new_empty(N, H * V)
    WP, KP, VP, RP = (triton.next_power_of_2(size) for size in (width, K, V, R))
    early = begin_early(x.device)
    run(
        mix_token, N * H, (x, *low, *weights, *pool, y, scale, largest_erase, L2_EPS, norm_eps),
        (H, K, V, R, width, WP, KP, VP, RP, early), WARPS, early=early > 0,
    )  # fmt: skip
    return y


def _check(x: Tensor, low: LowRank, weights: Weights, pool: State, sizes: tuple[int, int, int]) -> None:
    keys, values, R = sizes
    widths = (keys, keys, values, keys, values, R, R)
    shapes = ((x, (x.shape[0], sum(widths))), (low.f, (keys, R)), (low.gate, (values, R)), (low.bias, (values,)))
    for name, (tensor, shape) in zip(("x", *LowRank._fields), shapes):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
    q, k, v, b, w, _, _ = x.split(widths, dim=1)
    check(Token(q, k, v, q, b, w, v), weights, pool, x.shape[0])  # f and the gate will be of the shapes of q and v
    check_contiguous(pool)
