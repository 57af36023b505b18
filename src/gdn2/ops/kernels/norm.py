"""Norms over the last axis: RMSNorm, gated RMSNorm and the L2 norm are one pair of kernels.

    r = (share * sum x^2 + eps)^-1/2        y = r x * weight * silu(gate)        share = 1 / D, or 1 for the L2 norm

without weight or gate where there is none. The backward computes r again from x; with n = r x, h = dy * silu(gate):

    dx = r (h weight - n share <n, h weight>)      dweight = sum_rows h n      dgate = dy n weight silu'(gate)

With ADD x is the sum of two tensors, which is a result too: backward, its own gradient is added to dx, that of both.
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
from gdn2.ops.kernels.run import INTERPRET, run

ELEMENTS = 2048  # per tile
ROWS = 16  # of a program of the backward at least, in 4 tiles at least: fewer partial sums


@triton.jit
def row_tile(ptr, rows, cols, R, D: tl.constexpr):
    """Rows of a [R, D] matrix in float32, zero outside."""
    mask = (rows < R)[:, None] & (cols < D)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row_tile(ptr, x, rows, cols, R, D: tl.constexpr):
    mask = (rows < R)[:, None] & (cols < D)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * D + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def normalize(
    x_ptr, added_ptr, weight_ptr, gate_ptr, sum_ptr, y_ptr, R, eps,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, SHARE: tl.constexpr,
    WEIGHT: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """y, BR rows at a time; with ADD the sum as well, rounded as it is stored before its norm is taken."""
    rows, cols = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    x = row_tile(x_ptr, rows, cols, R, D)
    if ADD:
        x = (x + row_tile(added_ptr, rows, cols, R, D)).to(sum_ptr.dtype.element_ty)
        store_row_tile(sum_ptr, x, rows, cols, R, D)
        x = x.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 1) * SHARE + eps)[:, None]
    if WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if GATE:
        gate = row_tile(gate_ptr, rows, cols, R, D)
        y *= gate * sigmoid(gate, tl.float32)
    store_row_tile(y_ptr, y, rows, cols, R, D)


@triton.jit
def normalize_back(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, gate_ptr, dx_ptr, dadded_ptr, dweight_ptr, dgate_ptr, R, eps,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, TILES: tl.constexpr, SHARE: tl.constexpr,
    WEIGHT: tl.constexpr, GATE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dx, dadded and dgate of BR * TILES rows, and their share of dweight [programs, D]."""
    cols = tl.arange(0, BD)
    weight = tl.full((BD,), 1.0, tl.float32)
    if WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BR, BD), tl.float32)
    for i in range(TILES):
        rows = (tl.program_id(0) * TILES + i) * BR + tl.arange(0, BR)
        h, x = row_tile(dy_ptr, rows, cols, R, D), row_tile(x_ptr, rows, cols, R, D)
        r = tl.rsqrt(tl.sum(x * x, 1) * SHARE + eps)[:, None]
        n = x * r
        if GATE:
            gate = row_tile(gate_ptr, rows, cols, R, D)
            s = sigmoid(gate, tl.float32)
            slope = s * (1.0 + gate * (1.0 - s))
            store_row_tile(dgate_ptr, h * n * weight[None, :] * slope, rows, cols, R, D)
            h *= gate * s
        dweight += h * n
        h *= weight[None, :]
        dx = r * (h - n * (tl.sum(n * h, 1) * SHARE)[:, None])
        if ADD:
            dx += row_tile(dsum_ptr, rows, cols, R, D)
            store_row_tile(dadded_ptr, dx, rows, cols, R, D)
        store_row_tile(dx_ptr, dx, rows, cols, R, D)
    if WEIGHT:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + cols, tl.sum(dweight, 0), mask=cols < D)


def _tile(D: int) -> tuple[int, int, int, int]:
    """Columns and rows of a tile, tiles of a program of the backward, and warps."""
    BD = triton.next_power_of_2(D)
    BR = 8 if INTERPRET else max(1, ELEMENTS // BD)
    return BD, BR, max(4, ROWS // BR), 4 if BD <= 2048 else 8 if BD <= 4096 else 16  # some 100 registers a thread


def _forward(
    x: Tensor, added: Tensor | None, weight: Tensor | None, gate: Tensor | None, eps: float, share: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y, and the sum where there is one."""
    D = x.shape[-1]
    R, (BD, BR, _, warps) = x.numel() // D, _tile(D)
    x = x.contiguous()
    added, weight, gate = (None if t is None else t.contiguous() for t in (added, weight, gate))
    verdicts.demand(verdicts.AROUND, x.device)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = None if added is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, added.dtype))
    constants = (D, BD, BR, share, weight is not None, gate is not None, added is not None)
    run(normalize, triton.cdiv(R, BR), (x, added, weight, gate, total, y, R, eps), constants, warps)
    return y, total


def _back(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, share: float,
    added: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, what is added to it, weight and gate; empty where there is none."""
    D = x.shape[-1]
    R, (BD, BR, tiles, warps) = x.numel() // D, _tile(D)
    dy, x = dy.contiguous(), x.contiguous()
    dtotal, weight, gate = (None if t is None else t.contiguous() for t in (dtotal, weight, gate))
    dx, dgate = torch.empty_like(x), x.new_empty(0) if gate is None else torch.empty_like(gate)
    dadded = x.new_empty(0) if added is None else torch.empty_like(x, dtype=added)
    programs = triton.cdiv(R, BR * tiles)
    dweight = torch.empty(0 if weight is None else (programs, D), dtype=torch.float32, device=x.device)
    run(
        normalize_back, programs, (dy, dtotal, x, weight, gate, dx, dadded, dweight, dgate, R, eps),
        (D, BD, BR, tiles, share, weight is not None, gate is not None, added is not None), warps,
    )  # fmt: skip
    return dx, dadded, x.new_empty(0) if weight is None else dweight.sum(0).to(weight.dtype), dgate


@op("gdn2::norm")
def _norm(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, share: float, dtype: torch.dtype
) -> Tensor:
    return _forward(x, None, weight, gate, eps, share, dtype)[0]


@_norm.register_fake
def _(x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, share: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@op("gdn2::norm_backward")
def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and gate; empty where there is none."""
    dx, _, dweight, dgate = _back(dy, None, x, weight, gate, eps, share, None)
    return dx, dweight, dgate


@_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dgate = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, gate))
    return x.new_empty(x.shape), dweight, dgate


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.share, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    gradients = _norm_backward(dy, *saved, ctx.eps, ctx.share)
    return *(g if t is not None else None for g, t in zip(gradients, saved)), None, None, None


_norm.register_autograd(_backward, setup_context=_setup)


@op("gdn2::add_norm")
def _add_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y, total = _forward(x, added, weight, None, eps, 1 / x.shape[-1], dtype)
    assert total is not None
    return total, y


@_add_norm.register_fake
def _(x: Tensor, added: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, added.dtype))
    return total, x.new_empty(x.shape, dtype=dtype)


@op("gdn2::add_norm_backward")
def _add_norm_backward(
    dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, eps: float, added: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in the dtype of the sum, of what is added, and of the weight."""
    return _back(dy, dtotal, total, weight, None, eps, 1 / total.shape[-1], added)[:3]


@_add_norm_backward.register_fake
def _(
    dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, eps: float, added: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return total.new_empty(total.shape), total.new_empty(total.shape, dtype=added), weight.new_empty(weight.shape)


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, added, weight, ctx.eps, _ = inputs
    ctx.dtypes = x.dtype, added.dtype
    ctx.save_for_backward(output[0], weight)


def _add_backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    dx, dadded, dweight = _add_norm_backward(dtotal, dy, total, weight, ctx.eps, ctx.dtypes[1])
    return dx.to(ctx.dtypes[0]), dadded, dweight, None, None


_add_norm.register_autograd(_add_backward, setup_context=_add_setup)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, times silu(gate) where there is one; x and gate [..., D], weight [D].

    Computed in float32; the result has the given dtype, else the gate's, or x's without one.
    """
    return _norm(x, weight, gate, eps, 1 / x.shape[-1], dtype or (x if gate is None else gate).dtype)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + added, in the wider dtype of the two, and its `rms_norm` in the given dtype; x and added [..., D]."""
    total, y = _add_norm(x, added, weight, eps, dtype)
    return total, y


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis; x [..., D]. Computed in float32."""
    return _norm(x, None, None, eps, 1.0, x.dtype)
