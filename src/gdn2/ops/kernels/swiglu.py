"""y = silu(gate) * up in one pass over memory, and its gradients in one, which keep gate and up alone.

dgate = dy up silu'(gate)      dup = dy silu(gate)
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.maths import sigmoid
from gdn2.ops.kernels.op import op
from gdn2.ops.kernels.run import run

BLOCK = 2048  # numbers of a program


@triton.jit
def multiply(gate_ptr, up_ptr, y_ptr, n, BLOCK: tl.constexpr, APART: tl.constexpr):
    """y, BLOCK numbers at a time. Gate and up are matrices of their own, or the halves, APART wide, of one's rows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    source = at
    if APART:
        source += at // APART * APART
    gate = tl.load(gate_ptr + source, mask=inside, other=0.0).to(tl.float32)
    y = gate * sigmoid(gate, tl.float32) * tl.load(up_ptr + source, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def multiply_back(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    """dgate and dup, BLOCK numbers at a time."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(gate, tl.float32)
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + at, (dy * gate * s).to(dup_ptr.dtype.element_ty), mask=inside)


@op("gdn2::swiglu")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    verdicts.demand(verdicts.AROUND, gate.device)
    y, n = torch.empty_like(gate), gate.numel()
    run(multiply, triton.cdiv(n, BLOCK), (gate, up, y, n), (BLOCK, 0))
    return y


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@op("gdn2::swiglu_backward")
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    run(multiply_back, triton.cdiv(n, BLOCK), (dy, gate, up, dgate, dup, n), (BLOCK,))
    return dgate, dup


@_swiglu_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _swiglu_backward(dy, *ctx.saved_tensors)
    return dgate, dup


_swiglu.register_autograd(_backward, setup_context=_setup)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of equal shapes, in gate's dtype, rounded once. Differentiable in both."""
    y: Tensor = _swiglu(gate, up)
    return y


def swiglu_of_pair(both: Tensor) -> Tensor:
    """silu(gate) * up [..., W] of [..., 2 W], the gate first, in the same dtype. No gradients: for a step."""
    W, both = both.shape[-1] // 2, both.contiguous()
    verdicts.demand(verdicts.DECODE, both.device)
    y = both.new_empty(*both.shape[:-1], W)
    n = y.numel()
    run(multiply, triton.cdiv(n, BLOCK), (both, both.flatten()[W:], y, n), (BLOCK, W))
    return y
