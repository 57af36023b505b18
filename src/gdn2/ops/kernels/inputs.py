"""Device functions: what the operator is given, as tiles in float32.

With ACT the operands are what a layer projects, and are activated on their way in:

    q <- q / |q|    k <- k / |k|    g = -exp(rate) softplus(f + delta)    b <- largest * sigmoid(b)   w alike  (11, 12)

|x| = sqrt(sum x^2 + eps). The gradients of the activations are here too.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from gdn2.ops.kernels.maths import settled, sigmoid, softplus
from gdn2.ops.kernels.tiles import gate_tile, token_tile


@triton.jit
def inverse_length(
    ptr, token, rows, n, head, eps,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """1 / |x| of each row [C, 1]; 1 without ACT."""
    squares = tl.zeros((rows.shape[0],), tl.float32)
    if ACT:
        for first in tl.range(0, DP, BD):
            x = token_tile(ptr, token, rows, n, head, HEADS, D, first, BD)
            squares += tl.sum(x * x, 1)
        squares = tl.rsqrt(squares + eps)
    else:
        squares += 1.0
    return squares[:, None]


@triton.jit
def _shift(
    f, rate_ptr, delta_ptr, head, first, K: tl.constexpr, DG: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """f + delta [C, BK], and -exp(rate)."""
    cols = first + tl.arange(0, BK)
    delta = tl.load(delta_ptr + head * DG + cols * (DG > 1), mask=cols < K, other=0.0).to(tl.float32)
    return f + delta[None, :], -tl.exp(tl.load(rate_ptr + head).to(tl.float32))


@triton.jit
def decay_tile(
    g_ptr, rate_ptr, delta_ptr, token, rows, n, head,
    H: tl.constexpr, K: tl.constexpr, DG: tl.constexpr, first, BK: tl.constexpr, DT: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """The log-decay of BK channels, zero beyond n and K."""
    g = gate_tile(g_ptr, token, rows, n, head, H, DG, first, BK, 0.0)
    if ACT and DG != 0:
        x, pace = _shift(g, rate_ptr, delta_ptr, head, first, K, DG, BK)
        cols = first + tl.arange(0, BK)
        g = settled(tl.where((rows[:, None] < n) & (cols[None, :] < K), pace * softplus(x, DT), 0.0))
    return g


@triton.jit
def decay_gradient(
    dg, g_ptr, rate_ptr, delta_ptr, token, rows, n, head,
    H: tl.constexpr, K: tl.constexpr, DG: tl.constexpr, first, BK: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """df = -dg exp(rate) sigmoid(f + delta), which is ddelta too, and drate = sum dg g; with ACT."""
    f = gate_tile(g_ptr, token, rows, n, head, H, DG, first, BK, 0.0)
    x, pace = _shift(f, rate_ptr, delta_ptr, head, first, K, DG, BK)
    dx = tl.where(rows[:, None] < n, dg * pace, 0.0)
    return dx * sigmoid(x, DT), tl.sum(dx * softplus(x, DT))


@triton.jit
def opened(x, largest, DT: tl.constexpr, ACT: tl.constexpr):
    """A gate in [0, largest] from what was loaded."""
    return settled(largest * sigmoid(x, DT)) if ACT else x


@triton.jit
def opened_gradient(dy, y, largest, ACT: tl.constexpr):
    """Of what was loaded, from those of the gate y."""
    return dy * y * (1.0 - y * (1.0 / largest)) if ACT else dy


@triton.jit
def written(
    v_ptr, w_ptr, token, rows, n, value_head, first, largest_write,
    HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, DW: tl.constexpr, DT: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Z = w * v."""
    v = token_tile(v_ptr, token, rows, n, value_head, HV, V, first, BV)
    w = gate_tile(w_ptr, token, rows, n, value_head, HV, DW, first, BV, 1.0)
    return v * opened(w, largest_write, DT, ACT and DW != 0)
