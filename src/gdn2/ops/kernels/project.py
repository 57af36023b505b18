"""A few rows times a matrix, with what stands before and after it in a decoding step: norm, residual sum and SwiGLU.

The weights are the traffic, and do not depend on the kernel before: a program has all of its own on their way before it
waits for that kernel's results. Every output is summed by one program, in one order.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# ruff: noqa: RUF005  (Triton has no starred expressions)

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.early import begin_early, wait_for_inputs
from gdn2.ops.kernels.maths import sigmoid
from gdn2.ops.kernels.run import run

MOST_ROWS = 2  # of x, which share one reading of the weights: two reach 69 % of its rate on an H100, four 44 %
MOST_BYTES = 16_384  # of a row of weights: it lies in a program's registers
WARP_BYTES = 10_240  # of weights that a warp holds, 80 registers a thread, and half of it with more than one row of x
MANY_OUTPUTS = 8_192  # from there on each warp, or group of warps, takes TILES rows of weights
WARPS, TILES = 4, 2


@triton.jit
def project_rows(
    x_ptr, norm_ptr, weight_ptr, added_ptr, y_ptr, eps, outputs,
    I: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, PAIR: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y[n, o] = sum_i W[o, i] h[n, i] + added[n, o] for all ROWS rows n, and TILES times BO outputs o.

    h is x, or with NORM x / sqrt(mean(x^2) + eps) * norm. As a PAIR, W [2 * outputs, I] is a gate above an up
    projection, of which a program takes BO outputs as its two tiles, and the sum is silu(gate) * up.

    Each of BO rows lies in a warp or a few, and x beside each, so that nothing is exchanged before the last sum.
    """
    lanes = tl.arange(0, BO)
    weights, norm = (), ()
    for begin in tl.static_range(0, I, BI):
        i = begin + tl.arange(0, BI)
        for tile in tl.static_range(TILES):
            # Past the end the last row is read again, which needs no mask.
            if PAIR:
                out = tile * outputs + tl.minimum(tl.program_id(0) * BO + lanes, outputs - 1)
            else:
                out = tl.minimum((tl.program_id(0) * TILES + tile) * BO + lanes, outputs - 1)
            at = weight_ptr + out.to(tl.int64)[:, None] * I + i[None, :]
            weights = weights + (load_columns(at, i, begin + BI <= I, I),)
        if NORM and ROWS == 1:
            norm = norm + (load_input(norm_ptr, lanes, 0, begin, I, BI),)
    wait_for_inputs(EARLY)
    alone = ()
    if ROWS == 1:  # all of x at once; more rows leave no registers for it
        for begin in tl.static_range(0, I, BI):
            alone = alone + (load_input(x_ptr, lanes, 0, begin, I, BI),)
    sums = (tl.zeros((BO, BI), tl.float32),) * (ROWS * TILES)
    squares = (tl.zeros((BO, BI), tl.float32),) * ROWS
    for begin in tl.static_range(0, I, BI):
        sums_, squares_ = (), ()
        if NORM:
            factor = (norm[begin // BI] if ROWS == 1 else load_input(norm_ptr, lanes, 0, begin, I, BI)).to(tl.float32)
        for n in tl.static_range(ROWS):
            h = (alone[begin // BI] if ROWS == 1 else load_input(x_ptr, lanes, n, begin, I, BI)).to(tl.float32)
            if NORM:
                squares_ = squares_ + (squares[n] + h * h,)
                h *= factor
            for tile in tl.static_range(TILES):
                sums_ = sums_ + (sums[n * TILES + tile] + weights[begin // BI * TILES + tile].to(tl.float32) * h,)
        sums = sums_
        if NORM:
            squares = squares_
    for n in tl.static_range(ROWS):
        share = tl.full((BO,), 1.0, tl.float32)
        if NORM:
            share = tl.rsqrt(tl.sum(squares[n], 1) / I + eps)
        if PAIR:
            gate = tl.sum(sums[n * TILES], 1) * share
            y = gate * sigmoid(gate, tl.float32) * (tl.sum(sums[n * TILES + 1], 1) * share)
            store_outputs(y, tl.program_id(0) * BO + lanes, n, added_ptr, y_ptr, outputs, ADD)
        else:
            for tile in tl.static_range(TILES):
                out = (tl.program_id(0) * TILES + tile) * BO + lanes
                y = tl.sum(sums[n * TILES + tile], 1) * share
                store_outputs(y, out, n, added_ptr, y_ptr, outputs, ADD)


@triton.jit
def load_input(x_ptr, lanes, n, begin: tl.constexpr, I: tl.constexpr, BI: tl.constexpr):
    """Columns of row n of x, once for each lane."""
    i = begin + tl.arange(0, BI)
    return load_columns(x_ptr + n * I + 0 * lanes[:, None] + i[None, :], i, begin + BI <= I, I)


@triton.jit
def load_columns(at, i, WHOLE: tl.constexpr, I: tl.constexpr):
    """A tile of columns i; zeros beyond I unless all of it is there."""
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=(i < I)[None, :], other=0.0)


@triton.jit
def store_outputs(y, out, n, added_ptr, y_ptr, outputs, ADD: tl.constexpr):
    if ADD:
        y += tl.load(added_ptr + n * outputs + out, mask=out < outputs, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * outputs + out, y.to(y_ptr.dtype.element_ty), mask=out < outputs)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `project` takes these: up to MOST_ROWS rows [..., I] of x, and a weight [O, I] alike."""
    rows = x.numel() // x.shape[-1]
    alike = x.dtype == weight.dtype and x.device == weight.device
    short = weight.shape[-1] * weight.element_size() <= MOST_BYTES
    return alike and short and 1 <= rows <= MOST_ROWS and weight.is_contiguous()


def project(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
    swiglu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W h + added [..., O] in `dtype`, x's unless given, for what `fits`; no gradients.

    x [..., I] and weight [O, I] of one dtype. h is x, or with `norm` [I] its RMSNorm of that weight and eps. With
    `swiglu` weight [2 O, I] is a gate above an up projection, and silu(gate h) * (up h) takes the place of W h.
    ValueError for shapes that are not these.
    """
    I, O = x.shape[-1], weight.shape[0] // (2 if swiglu else 1)
    expected = {"weight": (weight, weight.shape[:1] + (I,)), "norm": (norm, (I,)), "added": (added, (*x.shape[:-1], O))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tensor.shape != shape or (tensor is weight and not weight.is_contiguous())):
            found = f"{name} has shape {list(tensor.shape)} and strides {tensor.stride()}"
            raise ValueError(f"{found}; expected {list(shape)}, contiguous, beside x of {list(x.shape)}")
    x = x.contiguous()
    norm, added = (None if t is None else t.contiguous() for t in (norm, added))
    verdicts.demand(verdicts.DECODE, x.device)
    y = x.new_empty(*x.shape[:-1], O, dtype=dtype or x.dtype)
    early, size = begin_early(x.device), weight.element_size()
    tiles = 2 if swiglu else TILES if O >= MANY_OUTPUTS else 1
    rows = x.numel() // I
    wide = triton.next_power_of_2(triton.cdiv(tiles * I * size * min(rows, 2), WARP_BYTES))  # warps of a row of weights
    BI = min(wide * 512 // size, triton.next_power_of_2(I))  # 16 bytes a thread
    BO = max(1, WARPS // wide)
    run(
        project_rows, triton.cdiv(O, BO if swiglu else BO * tiles),
        (x, norm, weight, added, y, eps, O),
        (I, rows, tiles, BO, BI, swiglu, norm is not None, added is not None, early),
        max(WARPS, wide), early=early > 0,
    )  # fmt: skip
    return y
