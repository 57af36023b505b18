"""Forward kernels: `prepare_chunks` (all chunks in parallel), then `scan_chunks` (chunks in order, state on chip).

Legend, as in `reference.py` with the paper's symbols inside a chunk: S is the state before the chunk, E = gamma * b * k
(the paper's Ebar), Q = gamma * scale * q (Q_gamma), Z = w * v, A = (I + T)^-1, and

    Y = A E    U = A Z    P = Q - A_qk Y    O_local = A_qk U    K_tail = (gamma_C / gamma) * k
    R = U - Y S    O = P S + O_local    S <- gamma_C * S + K_tail^T R                     (22-25, 35)

Scratch is chunk-major, [chunks, heads, C, padded head size], in the operand type DT; rows past a sequence's end are
zero. KP and VP are the head sizes padded to a power of two. DG, DB and DW are the last axes of log-decay, erase and
write: 0 when there is no such gate, 1 when it is shared by the channels.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from gdn2.ops.kernels.solve import unit_lower_inverse
from gdn2.ops.kernels.tiles import (
    block_sums,
    from_middle,
    gate_tile,
    half_pair,
    offsets,
    product,
    same_block,
    store_token_tile,
    token_tile,
)


@triton.jit
def _scores(q, e, k, mask, ERASE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr):
    """q k^T and e k^T where `mask` holds, of rows that are scaled already."""
    k = tl.trans(k.to(DT))
    qk = tl.where(mask, product(q, k, DT, PREC), 0.0)
    ek = tl.where(mask, product(e, k, DT, PREC), 0.0) if ERASE else qk
    return qk, ek


@triton.jit
def _strong_scores(
    q, e, k, g, g_next, rows,
    LOG_C: tl.constexpr, ERASE: tl.constexpr, RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`_scores` of the pairs r > s of a strong chunk, with their decay ratios."""
    qk = tl.zeros((2**LOG_C, 2**LOG_C), tl.float32)
    ek = tl.zeros((2**LOG_C, 2**LOG_C), tl.float32)
    level = tl.full((), LOG_C, tl.int32)
    P = tl.cumsum(g, 0)
    while tl.min(P) < -RANGE:
        level -= 1
        P, X = block_sums(g, g_next, rows, level)
        late = tl.exp(P)
        more_qk, more_ek = _scores(q * late, e * late, k * tl.exp(X), half_pair(rows, level), ERASE, DT, PREC)
        qk += more_qk
        ek += more_ek
        P = tl.where(level == 0, 0.0, P)
    late = tl.exp(P)
    more_qk, more_ek = _scores(q * late, e * late, k * tl.exp(-P), same_block(rows, level), ERASE, DT, PREC)
    return qk + more_qk, ek + more_ek


@triton.jit
def prepare_chunks(
    q_ptr, k_ptr, v_ptr, g_ptr, b_ptr, w_ptr,
    Y_ptr, P_ptr, K_tail_ptr, gamma_ptr, before_ptr, after_ptr, U_ptr, O_local_ptr, A_ptr, A_qk_ptr,
    token_ptr, length_ptr, strong_ptr, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    DG: tl.constexpr, DB: tl.constexpr, DW: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, SOLVE: tl.constexpr, SAVE: tl.constexpr,
    STRONG: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head: everything of the legend that does not need S; A and A_qk too when SAVE.

    The launch with STRONG unset marks the strong chunks and leaves them to the one with STRONG. E and Q wait in the
    buffers of Y and P until A is known.
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    n = tl.load(length_ptr + chunk)
    if n == 0:
        return
    if STRONG and tl.load(strong_ptr + tl.program_id(0)) == 0:
        return
    token = tl.load(token_ptr + chunk)
    unit = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, C)
    ERASE: tl.constexpr = DB != 0

    T = tl.zeros((C, C), tl.float32)
    A_qk = tl.zeros((C, C), tl.float32)
    diagonal = tl.zeros((C,), tl.float32)
    weakest = 0.0
    for first in tl.range(0, KP, BK):
        cols = first + tl.arange(0, BK)
        tile = unit * C * KP + offsets(rows, cols, KP)
        g = gate_tile(g_ptr, token, rows, n, head, H, DG, cols, 0.0)
        q = token_tile(q_ptr, token, rows, n, head, H, K, cols) * scale
        k = token_tile(k_ptr, token, rows, n, head, H, K, cols)
        e = k * gate_tile(b_ptr, token, rows, n, head, H, DB, cols, 0.0)
        diagonal += tl.sum(q * k, 1)
        if STRONG:
            g_next = gate_tile(g_ptr, token, rows + 1, n, head, H, DG, cols, 0.0)
            qk, ek = _strong_scores(q, e, k, g, g_next, rows, LOG_C, ERASE, RANGE, DT, PREC)
            gamma = tl.exp(tl.cumsum(g, 0))
            before = tl.full((BK,), 1.0, tl.float32)
            after = before
            gamma_C = tl.exp(tl.sum(g, 0))
            Q, E = q * gamma, e * gamma
            K_tail = k * tl.exp(tl.cumsum(g_next, 0, reverse=True))
        else:
            D, before, after = from_middle(g, rows, C, RANGE)
            weakest = tl.minimum(weakest, tl.min(tl.minimum(before, after)))
            before, after = tl.exp(before), tl.exp(after)
            gamma_C = before * after
            Q, E, K_tail = q * tl.exp(D), e * tl.exp(D), k * tl.exp(-D)
            qk, ek = _scores(Q, E, K_tail, rows[:, None] > rows[None, :], ERASE, DT, PREC)
            Q, E, K_tail = Q * before[None, :], E * before[None, :], K_tail * after[None, :]
        tl.store(P_ptr + tile, Q.to(DT))
        if ERASE:
            tl.store(Y_ptr + tile, E.to(DT))
        tl.store(K_tail_ptr + tile, K_tail.to(DT))
        vector = unit * KP + cols
        tl.store(gamma_ptr + vector, gamma_C)
        if SAVE:
            tl.store(before_ptr + vector, before)
            tl.store(after_ptr + vector, after)
        A_qk += qk
        T += ek
    if not STRONG:
        strong = weakest < -RANGE
        tl.store(strong_ptr + tl.program_id(0), strong.to(tl.int8))
        if strong:
            return
    A_qk = tl.where(rows[:, None] == rows[None, :], diagonal[:, None], A_qk).to(DT)
    square = unit * C * C + offsets(rows, rows, C)
    if SAVE:
        tl.store(A_qk_ptr + square, A_qk)
    if ERASE:
        A = unit_lower_inverse(T, LOG_C, SOLVE).to(DT)
        if SAVE:
            tl.store(A_ptr + square, A)
        tl.debug_barrier()
        for first in tl.range(0, KP, BK):
            cols = first + tl.arange(0, BK)
            tile = unit * C * KP + offsets(rows, cols, KP)
            Y = product(A, tl.load(Y_ptr + tile), DT, PREC).to(DT)
            P = tl.load(P_ptr + tile).to(tl.float32) - product(A_qk, Y, DT, PREC)
            tl.debug_barrier()
            tl.store(Y_ptr + tile, Y)
            tl.store(P_ptr + tile, P.to(DT))

    for part in tl.range(0, (HV // H) * (VP // BV)):
        value_head = head * (HV // H) + part // (VP // BV)
        cols = (part % (VP // BV)) * BV + tl.arange(0, BV)
        Z = token_tile(v_ptr, token, rows, n, value_head, HV, V, cols)
        U = (Z * gate_tile(w_ptr, token, rows, n, value_head, HV, DW, cols, 1.0)).to(DT)
        if ERASE:
            U = product(A, U, DT, PREC).to(DT)
        tile = (chunk.to(tl.int64) * HV + value_head) * C * VP + offsets(rows, cols, VP)
        tl.store(U_ptr + tile, U)
        tl.store(O_local_ptr + tile, product(A_qk, U, DT, PREC).to(DT))


@triton.jit
def scan_chunks(
    Y_ptr, P_ptr, K_tail_ptr, gamma_ptr, before_ptr, U_ptr, O_local_ptr, S_first_ptr,
    o_ptr, S_last_ptr, S_ptr, R_ptr,
    start_ptr, first_chunk_ptr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
    ERASE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """One sequence, one value head, BV value channels: the third line of the legend, chunk after chunk.

    FIRST and LAST say whether there is an initial state and whether the final one is wanted; SAVE keeps R and
    `before` * S of every chunk for the backward.
    """
    PARTS: tl.constexpr = VP // BV
    sequence, value_head = tl.program_id(0) // (PARTS * HV), tl.program_id(0) // PARTS % HV
    head = value_head // (HV // H)
    rows, keys = tl.arange(0, C), tl.arange(0, KP)
    cols = (tl.program_id(0) % PARTS) * BV + tl.arange(0, BV)
    state = (sequence.to(tl.int64) * HV + value_head) * K * V + offsets(keys, cols, V)
    inside = (keys[:, None] < K) & (cols[None, :] < V)
    start, end = tl.load(start_ptr + sequence), tl.load(start_ptr + sequence + 1)
    first, last = tl.load(first_chunk_ptr + sequence), tl.load(first_chunk_ptr + sequence + 1)
    by_key, by_value, by_state = offsets(rows, keys, KP), offsets(rows, cols, VP), offsets(keys, cols, VP)

    S = tl.zeros((KP, BV), tl.float32)
    if FIRST:
        S += tl.load(S_first_ptr + state, mask=inside, other=0.0)
    for step in tl.range(0, last - first, num_stages=STAGES):
        key_unit, value_unit = (first.to(tl.int64) + step) * H + head, (first.to(tl.int64) + step) * HV + value_head
        P = tl.load(P_ptr + key_unit * C * KP + by_key)
        K_tail = tl.load(K_tail_ptr + key_unit * C * KP + by_key)
        gamma = tl.load(gamma_ptr + key_unit * KP + keys)
        R = tl.load(U_ptr + value_unit * C * VP + by_value)
        O_local = tl.load(O_local_ptr + value_unit * C * VP + by_value)
        S_low = S.to(DT)
        if SAVE:
            before = tl.load(before_ptr + key_unit * KP + keys)
            tl.store(S_ptr + value_unit * KP * VP + by_state, (S * before[:, None]).to(DT))
        if ERASE:
            Y = tl.load(Y_ptr + key_unit * C * KP + by_key)
            R = (R.to(tl.float32) - product(Y, S_low, DT, PREC)).to(DT)
            if SAVE:
                tl.store(R_ptr + value_unit * C * VP + by_value, R)
        o = O_local.to(tl.float32) + product(P, S_low, DT, PREC)
        token = start + step * C
        store_token_tile(o_ptr, o, token, rows, end - token, value_head, HV, V, cols)
        S = S * gamma[:, None] + product(tl.trans(K_tail), R, DT, PREC)
    if LAST:
        tl.store(S_last_ptr + state, S, mask=inside)
