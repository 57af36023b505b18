"""Rotary positions in one pass over memory: channel i turns with channel i + D / 2, by the same angle in every head.

    y_i = x_i cos - x_{i + D/2} sin        y_{i + D/2} = x_{i + D/2} cos + x_i sin

The gradient turns back: the same kernel with the angles negated.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.op import op
from gdn2.ops.kernels.run import INTERPRET, run

TOKENS = 4 if INTERPRET else 16  # of a program, all heads one after the other


@triton.jit
def turn(
    x_ptr, angle_ptr, y_ptr, tokens, angles,
    HEADS: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, BT: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """BT tokens; `angles` rows of them are there, which repeat for every sequence."""
    HALF: tl.constexpr = D // 2
    t, cols = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, HP)
    mask = (t < tokens)[:, None] & (cols < HALF)[None, :]
    row = (t % angles).to(tl.int64)
    angle = tl.load(angle_ptr + row[:, None] * HALF + cols[None, :], mask=mask, other=0.0)
    cos, sin = tl.cos(angle), SIGN * tl.sin(angle)
    for head in range(HEADS):
        at = (t.to(tl.int64) * HEADS + head)[:, None] * D + cols[None, :]
        a = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_ptr + at + HALF, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)


@op("gdn2::rotate")
def _rotate(x: Tensor, angles: Tensor, back: bool) -> Tensor:
    B, T, heads, D = x.shape
    x, angles = x.contiguous(), angles.contiguous()
    verdicts.demand(verdicts.AROUND, x.device)
    y = torch.empty_like(x)
    constants = (heads, D, triton.next_power_of_2(D // 2), TOKENS, -1 if back else 1)
    run(turn, triton.cdiv(B * T, TOKENS), (x, angles, y, B * T, angles.shape[0] * T), constants)
    return y


@_rotate.register_fake
def _(x: Tensor, angles: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    _, angles, ctx.back = inputs
    ctx.save_for_backward(angles)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (angles,) = ctx.saved_tensors
    return _rotate(dy, angles, not ctx.back), None, None


_rotate.register_autograd(_backward, setup_context=_setup)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, T, heads, D] turned by angles [B or 1, T, D / 2] float32, in x's dtype; no gradient of the angles."""
    y: Tensor = _rotate(x, angles, False)
    return y
