"""A few rows times a matrix of 8-bit weights with a scale for each output: what decoding spends its time on.

The weights are the traffic: they are read once as they are, and become float32 in registers.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# ruff: noqa: RUF005  (Triton has no starred expressions)

import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.run import run

ROWS = 4  # rows of x that share one reading of the weights: each needs a tile of sums in registers
MOST_ROWS = 16  # with more, weights made 16 bits wide once and a matrix product cost less
OUTPUTS, INPUTS = 4, 1024  # of a tile of weights


@triton.jit
def multiply_rows(
    x_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, rows, outputs,
    I: tl.constexpr, ROWS: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y[n, o] = scale[o] * sum_i x[n, i] codes[o, i] + bias[o] for ROWS rows n and BO outputs o."""
    groups = (rows + ROWS - 1) // ROWS  # programs of the same weights follow each other, so that a cache has them
    first, block = (tl.program_id(0) % groups) * ROWS, (tl.program_id(0) // groups).to(tl.int64)
    out = block * BO + tl.arange(0, BO)
    is_out = out < outputs
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BO, BI), tl.float32),)
    for begin in tl.static_range(0, I, BI):
        i = begin + tl.arange(0, BI)
        inside = is_out[:, None] & (i < I)[None, :]
        w = tl.load(codes_ptr + out[:, None] * I + i[None, :], mask=inside, other=0.0).to(tl.float32)
        added = ()
        for r in tl.static_range(ROWS):
            x = tl.load(x_ptr + (first + r) * I + i, mask=(i < I) & (first + r < rows), other=0.0).to(tl.float32)
            added = added + (sums[r] + w * x[None, :],)
        sums = added
    scale = tl.load(scale_ptr + out, mask=is_out, other=0.0)
    for r in tl.static_range(ROWS):
        y = tl.sum(sums[r], 1) * scale
        if BIAS:
            y += tl.load(bias_ptr + out, mask=is_out, other=0.0).to(tl.float32)
        tl.store(y_ptr + (first + r) * outputs + out, y.to(y_ptr.dtype.element_ty), mask=is_out & (first + r < rows))


def multiply(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [N, O] in x's dtype of x [N, I], codes [O, I] int8 or float8_e4m3fn, scale [O] float32 and bias [O]."""
    (N, I), O = x.shape, codes.shape[0]
    x, codes, scale = x.contiguous(), codes.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(N, O)
    verdicts.demand(verdicts.DECODE, x.device)
    rows = min(ROWS, triton.next_power_of_2(max(N, 1)))
    run(
        multiply_rows, triton.cdiv(N, rows) * triton.cdiv(O, OUTPUTS),
        (x, codes, scale, bias, y, N, O),
        (I, rows, OUTPUTS, min(INPUTS, triton.next_power_of_2(I)), bias is not None),
    )  # fmt: skip
    return y
