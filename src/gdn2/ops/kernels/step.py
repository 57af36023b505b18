"""Decode kernel: one token of the recurrence (9) for each sequence, the state read and written once."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from gdn2.ops.kernels.tiles import offsets


@triton.jit
def _gate(ptr, unit, D: tl.constexpr, channels, mask, FILL: tl.constexpr):
    """The gate of one head (D as in `forward.py`), in float32."""
    if D == 0:
        return tl.full((channels.shape[0],), FILL, tl.float32)
    else:
        return tl.load(ptr + unit * D + channels * (D > 1), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def step_token(
    q_ptr, k_ptr, v_ptr, g_ptr, b_ptr, w_ptr, S_ptr, slot_ptr, o_ptr, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    DG: tl.constexpr, DB: tl.constexpr, DW: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One sequence, one value head, BV value channels. S is updated in place, in row `slot` of the pool when SLOTS."""
    PARTS: tl.constexpr = (V + BV - 1) // BV
    sequence, value_head = tl.program_id(0) // (PARTS * HV), tl.program_id(0) // PARTS % HV
    unit = sequence.to(tl.int64) * H + value_head // (HV // H)
    value_unit = sequence.to(tl.int64) * HV + value_head
    keys = tl.arange(0, KP)
    cols = (tl.program_id(0) % PARTS) * BV + tl.arange(0, BV)
    is_key, is_col = keys < K, cols < V
    row = tl.load(slot_ptr + sequence).to(tl.int64) if SLOTS else sequence.to(tl.int64)
    state = (row * HV + value_head) * K * V + offsets(keys, cols, V)
    inside = is_key[:, None] & is_col[None, :]

    S = tl.load(S_ptr + state, mask=inside, other=0.0)
    q = tl.load(q_ptr + unit * K + keys, mask=is_key, other=0.0).to(tl.float32) * scale
    k = tl.load(k_ptr + unit * K + keys, mask=is_key, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + value_unit * V + cols, mask=is_col, other=0.0).to(tl.float32)
    S *= tl.exp(_gate(g_ptr, unit, DG, keys, is_key, 0.0))[:, None]
    r = tl.sum(S * (k * _gate(b_ptr, unit, DB, keys, is_key, 0.0))[:, None], 0)
    S += k[:, None] * (v * _gate(w_ptr, value_unit, DW, cols, is_col, 1.0) - r)[None, :]
    tl.store(S_ptr + state, S, mask=inside)
    tl.store(o_ptr + value_unit * V + cols, tl.sum(S * q[:, None], 0).to(o_ptr.dtype.element_ty), mask=is_col)
