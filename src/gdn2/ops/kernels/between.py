"""What lies between the matrix products of a decoding step: the residual sum with the norm after it, and SwiGLU.

No gradients: a step has none.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.maths import sigmoid
from gdn2.ops.kernels.run import run

BLOCK = 1024  # hidden channels of a program of SwiGLU


@triton.jit
def add_and_normalize(
    x_ptr, added_ptr, weight_ptr, sum_ptr, y_ptr, eps, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """A row: s = x + added, rounded as it is stored, and y = s / sqrt(mean(s^2) + eps) * weight."""
    cols = tl.arange(0, BD)
    at, inside = tl.program_id(0).to(tl.int64) * D + cols, cols < D
    s = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s += tl.load(added_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = s.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, s, mask=inside)
    s = s.to(tl.float32)
    y = s * tl.rsqrt(tl.sum(s * s) / D + eps) * tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_product(both_ptr, y_ptr, W: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK channels of a row: y = silu(gate) * up, with gate and up beside each other."""
    blocks: tl.constexpr = (W + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both_ptr + row * 2 * W + cols, mask=cols < W, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * W + W + cols, mask=cols < W, other=0.0).to(tl.float32)
    y = gate * sigmoid(gate, tl.float32) * up
    tl.store(y_ptr + row * W + cols, y.to(y_ptr.dtype.element_ty), mask=cols < W)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added and its RMSNorm, both in x's dtype; x and added [..., D], weight [D]."""
    D = x.shape[-1]
    x, added, weight = x.contiguous(), added.contiguous(), weight.contiguous()
    verdicts.demand(verdicts.DECODE, x.device)
    total, y = torch.empty_like(x), torch.empty_like(x)
    run(add_and_normalize, x.numel() // D, (x, added, weight, total, y, eps), (D, triton.next_power_of_2(D)))
    return total, y


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up [..., W] of [..., 2 W], the gate first, in the same dtype."""
    W, both = both.shape[-1] // 2, both.contiguous()
    verdicts.demand(verdicts.DECODE, both.device)
    y = both.new_empty(*both.shape[:-1], W)
    block = min(BLOCK, triton.next_power_of_2(W))
    run(swiglu_product, both.numel() // (2 * W) * triton.cdiv(W, block), (both, y), (W, block))
    return y
