"""Kernels for few long sequences: cut into segments, whose scans run side by side once the states between are known.

A segment takes the state S before it to M S + N, with M the product of its chunks' diag(gamma_C) - K_out^T E and N the
state that it reaches from zero. `map_segments` finds both for all segments at once, `fold_segments` runs through them
and stores the state before each. Backward the gradient of the state after a segment goes to M^T dS' + N', with N' found
by `map_segments_back`; the same M serves.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from gdn2.ops.kernels.tiles import offsets, product, token_tile


@triton.jit
def map_segments(
    E_ptr, K_out_ptr, gamma_ptr, Z_ptr, out_ptr, first_chunk_ptr,
    H: tl.constexpr, HV: tl.constexpr, D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
    ERASE: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    """BV columns of M (LINEAR; one for each of HV = H key heads, D = K) or of N (D = V) of one segment and head."""
    PARTS: tl.constexpr = DP // BV
    segment, out_head = tl.program_id(0) // (PARTS * HV), tl.program_id(0) // PARTS % HV
    head = out_head // (HV // H)
    rows, keys = tl.arange(0, C), tl.arange(0, KP)
    cols = (tl.program_id(0) % PARTS) * BV + tl.arange(0, BV)
    first, last = tl.load(first_chunk_ptr + segment), tl.load(first_chunk_ptr + segment + 1)
    by_key = offsets(rows, keys, KP)

    S = tl.zeros((KP, BV), tl.float32)
    if LINEAR:
        S += tl.where(keys[:, None] == cols[None, :], 1.0, 0.0)
    for step in tl.range(0, last - first, num_stages=STAGES):
        unit = (first.to(tl.int64) + step) * H + head
        K_out = tl.load((K_out_ptr + unit * C * KP) + by_key)
        gamma = tl.load(gamma_ptr + unit * KP + keys)
        if LINEAR:
            X = tl.zeros((C, BV), tl.float32)
        else:
            Z = tl.load((Z_ptr + ((first.to(tl.int64) + step) * HV + out_head) * C * DP) + offsets(rows, cols, DP))
            X = Z.to(tl.float32)
        if ERASE:
            E = tl.load((E_ptr + unit * C * KP) + by_key)
            X -= product(E, S, DT, PREC)
        S = S * gamma[:, None]
        if ERASE or not LINEAR:
            S += product(tl.trans(K_out), X, DT, PREC)
    inside = (keys[:, None] < K) & (cols[None, :] < D)
    tl.store(out_ptr + (segment.to(tl.int64) * HV + out_head) * K * D + offsets(keys, cols, D), S, mask=inside)


@triton.jit
def map_segments_back(
    E_ptr, Q_ptr, K_out_ptr, gamma_ptr, A_out_ptr, do_ptr, out_ptr, start_ptr, first_chunk_ptr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
    ERASE: tl.constexpr,
):  # fmt: skip
    """BV columns of N' of one segment and value head, last chunk first."""
    PARTS: tl.constexpr = VP // BV
    segment, value_head = tl.program_id(0) // (PARTS * HV), tl.program_id(0) // PARTS % HV
    head = value_head // (HV // H)
    rows, keys = tl.arange(0, C), tl.arange(0, KP)
    first_value = (tl.program_id(0) % PARTS) * BV
    cols = first_value + tl.arange(0, BV)
    start, end = tl.load(start_ptr + segment), tl.load(start_ptr + segment + 1)
    first, last = tl.load(first_chunk_ptr + segment), tl.load(first_chunk_ptr + segment + 1)
    by_key = offsets(rows, keys, KP)

    dS = tl.zeros((KP, BV), tl.float32)
    for step in tl.range(0, last - first, num_stages=STAGES):
        chunk = last.to(tl.int64) - 1 - step
        unit, token = chunk * H + head, start + (chunk - first) * C
        Q = tl.load((Q_ptr + unit * C * KP) + by_key)
        gamma = tl.load(gamma_ptr + unit * KP + keys)
        do = token_tile(do_ptr, token, rows, end - token, value_head, HV, V, first_value, BV).to(DT)
        dS_low = dS.to(DT)
        dS = dS * gamma[:, None] + product(tl.trans(Q), do, DT, PREC)
        if ERASE:
            E = tl.load((E_ptr + unit * C * KP) + by_key)
            A_out = tl.load((A_out_ptr + unit * C * C) + offsets(rows, rows, C))
            dX = product(tl.load((K_out_ptr + unit * C * KP) + by_key), dS_low, DT, PREC)
            dX = tl.dot(tl.trans(A_out), do, dX, input_precision=PREC)
            dS -= product(tl.trans(E), dX, DT, PREC)
    inside = (keys[:, None] < K) & (cols[None, :] < V)
    tl.store(out_ptr + (segment.to(tl.int64) * HV + value_head) * K * V + offsets(keys, cols, V), dS, mask=inside)


@triton.jit
def fold_segments(
    M_ptr, N_ptr, S_first_ptr, S_ptr, segment_ptr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PREC: tl.constexpr, FIRST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One sequence, one value head, BV value channels: S before each segment, or with BACK dS after each.

    FIRST says whether the first one is given; it is zero otherwise. Every product reads S where it was just stored.
    """
    PARTS: tl.constexpr = (V + BV - 1) // BV
    sequence, value_head = tl.program_id(0) // (PARTS * HV), tl.program_id(0) // PARTS % HV
    keys, inner = tl.arange(0, KP), tl.arange(0, BK)
    cols = (tl.program_id(0) % PARTS) * BV + tl.arange(0, BV)
    inside = (keys[:, None] < K) & (cols[None, :] < V)
    state = offsets(keys, cols, V)
    S = tl.zeros((KP, BV), tl.float32)
    if FIRST:
        S += tl.load(S_first_ptr + (sequence.to(tl.int64) * HV + value_head) * K * V + state, mask=inside, other=0.0)
    first, last = tl.load(segment_ptr + sequence), tl.load(segment_ptr + sequence + 1)
    for step in tl.range(0, last - first):
        segment = last - 1 - step if BACK else first + step
        here = (segment * HV + value_head) * K * V
        M = M_ptr + (segment * H + value_head // (HV // H)) * K * K
        tl.debug_barrier()
        tl.store((S_ptr + here) + state, S, mask=inside)
        tl.debug_barrier()
        S = tl.load((N_ptr + here) + state, mask=inside, other=0.0)
        for begin in tl.range(0, KP, BK):
            some = begin + inner
            part = tl.load(
                (S_ptr + here) + offsets(some, cols, V), mask=(some[:, None] < K) & (cols[None, :] < V), other=0.0
            )
            mask = (keys[:, None] < K) & (some[None, :] < K)
            at = keys[:, None] + some[None, :] * K if BACK else offsets(keys, some, K)
            S += product(tl.load(M + at, mask=mask, other=0.0), part, tl.float32, PREC)
