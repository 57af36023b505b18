"""Device functions: exponentials and what is made of them.

With bfloat16 operands (DT) they are the GPU's own approximations, a few units of 2^-22 off and without branches for
numbers below 1e-38; with float32 operands they are exact to float32 rounding.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from gdn2.ops.kernels.run import INTERPRET

ASSEMBLY = tl.constexpr(not INTERPRET)
LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x, DT: tl.constexpr):
    if ASSEMBLY and tl.float32 != DT:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(x)


@triton.jit
def exp_anew(x, DT: tl.constexpr):
    """`exp`, but never merged with an equal one: a tile is cheaper computed twice than kept in registers."""
    if ASSEMBLY and tl.float32 != DT:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.exp(x)


@triton.jit
def inverse_exp_anew(x, DT: tl.constexpr):
    """exp(-x) as `exp_anew`."""
    if ASSEMBLY and tl.float32 != DT:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.exp(-x)


@triton.jit
def settled(x):
    """x, computed here and not where it is used: what it is computed from need not stay in registers until then."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return x


@triton.jit
def _log2(x):
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x, DT: tl.constexpr):
    """Exact numbers stay at 2e-35 below x = -80, without an overflow; approximate ones reach 0 through infinity."""
    if ASSEMBLY and tl.float32 != DT:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"
            " add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 80.0)))


@triton.jit
def softplus(x, DT: tl.constexpr):
    """log(1 + exp(x)) for every x: max(x, 0) + log(1 + e), e = exp(-|x|).

    A logarithm near 1 is wrong on GPUs, and the decays of a fresh layer live there. Exact: log(1 + e) is 2 artanh(z),
    z = e / (2 + e) <= 1/3, by its series; the first term left out is z^15 / 15 < 5e-9 of the first. Approximate: the
    Taylor series up to e = 0.01, a logarithm above, 2e-5 off at most.
    """
    e = exp(-tl.abs(x), DT)
    if ASSEMBLY and tl.float32 != DT:
        log = tl.where(e < 0.01, e * (1.0 - e * (0.5 - e * (1 / 3))), _log2(1.0 + e) * LOG_2)
    else:
        z = e / (2.0 + e)
        s = z * z
        tail = 1 / 9 + s * (1 / 11 + s * (1 / 13))
        log = 2.0 * z * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * tail))))
    return tl.maximum(x, 0.0) + log
