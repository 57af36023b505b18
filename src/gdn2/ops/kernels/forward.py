"""Forward kernels: `prepare_chunks` (all chunks in parallel), then `scan_chunks` (chunks in order, state on chip).

Legend, as in `reference.py` with the paper's symbols inside a chunk: S is the state before the chunk, E = gamma * b * k
(the paper's Ebar), Q = gamma * scale * q (Q_gamma), Z = w * v, A = (I + T)^-1, and

    Y = A E    U = A Z    K_tail = (gamma_C / gamma) * k
    R = U - Y S    O = Q S + A_qk R    S <- gamma_C * S + K_tail^T R                      (22-25, 35)

Scratch is chunk-major, [chunks, heads, C, padded head size], in the operand type DT; rows past a sequence's end are
zero. KP and VP are the head sizes padded to a power of two. DG, DB and DW are the last axes of log-decay, erase and
write: 0 when there is no such gate, 1 when it is shared by the channels.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from gdn2.ops.kernels.inputs import decay_tile, inverse_length, opened
from gdn2.ops.kernels.maths import exp, exp_anew, inverse_exp_anew, settled
from gdn2.ops.kernels.solve import unit_lower_inverse
from gdn2.ops.kernels.tiles import (
    add_up,
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
def _strong_scores(
    q, e, k, g, g_next, A_qk, T, rows,
    LOG_C: tl.constexpr, ERASE: tl.constexpr, RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds q k^T and e k^T of the pairs r > s of a strong chunk, with their decay ratios, to A_qk and T."""
    level = tl.full((), LOG_C, tl.int32)
    P = tl.cumsum(g, 0)
    while tl.min(P) < -RANGE:
        level -= 1
        P, X = block_sums(g, g_next, rows, level)
        late, mask = exp(P, DT), half_pair(rows, level)
        early = tl.trans((k * exp(X, DT)).to(DT))
        A_qk += tl.where(mask, product(q * late, early, DT, PREC), 0.0)
        if ERASE:
            T += tl.where(mask, product(e * late, early, DT, PREC), 0.0)
        P = tl.where(level == 0, 0.0, P)
    late, mask = exp(P, DT), same_block(rows, level)
    early = tl.trans((k * exp(-P, DT)).to(DT))
    A_qk += tl.where(mask, product(q * late, early, DT, PREC), 0.0)
    if ERASE:
        T += tl.where(mask, product(e * late, early, DT, PREC), 0.0)
    return A_qk, T


@triton.jit
def _prepare_tile(
    A_qk, T, q_ptr, k_ptr, g_ptr, b_ptr, rate_ptr, delta_ptr, K_tail_ptr, gamma_ptr, before_ptr, after_ptr,
    token, rows, n, head, unit, cols, scale, shorter_q, shorter_k, largest_erase,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, DG: tl.constexpr, DB: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr,
    RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, SAVE: tl.constexpr, ACT: tl.constexpr,
    STRONG: tl.constexpr,
):  # fmt: skip
    """The channels `cols` of a chunk: Q and E, A_qk and T with what these add below the diagonal (and, unless STRONG,
    trash on and above it), diag(q k^T), and the largest decay. K_tail, gamma_C and the sums over the halves are stored.
    """
    ERASE: tl.constexpr = DB != 0
    g = decay_tile(g_ptr, rate_ptr, delta_ptr, token, rows, n, head, H, K, DG, cols, DT, ACT)
    weakest = 0.0
    if STRONG:
        g_next = decay_tile(g_ptr, rate_ptr, delta_ptr, token, rows + 1, n, head, H, K, DG, cols, DT, ACT)
        before = tl.full((cols.shape[0],), 1.0, tl.float32)
        after = before
        gamma_C = exp(tl.sum(g, 0), DT)
    else:
        before = tl.sum(tl.where(rows[:, None] < C // 2, g, 0.0), 0)
        after = tl.sum(tl.where(rows[:, None] < C // 2, 0.0, g), 0)
        weakest = tl.min(tl.minimum(before, after))
        before, after = exp(before, DT), exp(after, DT)
        gamma_C = before * after
        D = settled(add_up(from_middle(rows, C), g, DT, PREC))
    k = token_tile(k_ptr, token, rows, n, head, H, K, cols) * shorter_k
    q = token_tile(q_ptr, token, rows, n, head, H, K, cols) * (shorter_q * scale)
    diagonal = tl.sum(q * k, 1)
    e = k * opened(gate_tile(b_ptr, token, rows, n, head, H, DB, cols, 0.0), largest_erase, DT, ACT) if ERASE else q
    if STRONG:
        A_qk, T = _strong_scores(q, e, k, g, g_next, A_qk, T, rows, LOG_C, ERASE, RANGE, DT, PREC)
        gamma = exp(tl.cumsum(g, 0), DT)
        Q, E = q * gamma, e * gamma
        K_tail = k * exp(tl.cumsum(g_next, 0, reverse=True), DT)
    else:
        K_tail = (k * inverse_exp_anew(D, DT)).to(DT)
        Q = (q * exp_anew(D, DT)).to(DT)
        A_qk = tl.dot(Q, tl.trans(K_tail), A_qk, input_precision=PREC)
        E = Q
        if ERASE:
            E = (e * exp_anew(D, DT)).to(DT)
            T = tl.dot(E, tl.trans(K_tail), T, input_precision=PREC)
        Q, E, K_tail = Q * before[None, :], E * before[None, :], K_tail * after[None, :]
    tl.store((K_tail_ptr + unit * C * KP) + offsets(rows, cols, KP), K_tail.to(DT))
    vector = unit * KP
    tl.store(gamma_ptr + vector + cols, gamma_C)
    if SAVE:
        tl.store(before_ptr + vector + cols, before)
        tl.store(after_ptr + vector + cols, after)
    return Q.to(DT), E.to(DT), A_qk, T, diagonal, weakest


@triton.jit
def _written(
    v_ptr, w_ptr, token, rows, n, value_head, values, largest_write,
    HV: tl.constexpr, V: tl.constexpr, DW: tl.constexpr, DT: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Z = w * v."""
    v = token_tile(v_ptr, token, rows, n, value_head, HV, V, values)
    w = gate_tile(w_ptr, token, rows, n, value_head, HV, DW, values, 1.0)
    return (v * opened(w, largest_write, DT, ACT and DW != 0)).to(DT)


@triton.jit
def prepare_chunks(
    q_ptr, k_ptr, v_ptr, g_ptr, b_ptr, w_ptr, rate_ptr, delta_ptr,
    Y_ptr, Q_ptr, K_tail_ptr, gamma_ptr, before_ptr, after_ptr, U_ptr, A_ptr, A_qk_ptr,
    token_ptr, length_ptr, strong_ptr, scale, largest_erase, largest_write, eps,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    DG: tl.constexpr, DB: tl.constexpr, DW: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, SOLVE: tl.constexpr, SAVE: tl.constexpr,
    ACT: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head: everything of the legend that does not need S; A too when SAVE.

    The launch with STRONG unset marks the strong chunks and leaves them to the one with STRONG. Until A is known, E
    waits in registers, or in the buffer of Y when it takes more than one tile.
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    n = tl.load(length_ptr + chunk)
    if n == 0:
        return
    if STRONG and tl.load(strong_ptr + tl.program_id(0)) == 0:
        return
    token = tl.load(token_ptr + chunk)
    unit = tl.program_id(0).to(tl.int64)
    Y_ptr, Q_ptr = Y_ptr + unit * C * KP, Q_ptr + unit * C * KP
    rows = tl.arange(0, C)
    ERASE: tl.constexpr = DB != 0
    GROUP: tl.constexpr = HV // H
    WHOLE: tl.constexpr = BK == KP
    ONE: tl.constexpr = GROUP * (VP // BV) == 1
    if ONE:  # loaded early, so that they arrive while other things are computed
        Z = _written(v_ptr, w_ptr, token, rows, n, head, tl.arange(0, BV), largest_write, HV, V, DW, DT, ACT)

    shorter_q = inverse_length(q_ptr, token, rows, n, head, eps, H, K, KP, BK, ACT)
    shorter_k = inverse_length(k_ptr, token, rows, n, head, eps, H, K, KP, BK, ACT)
    A_qk = tl.zeros((C, C), tl.float32)
    T = tl.zeros((C, C), tl.float32)
    if WHOLE:
        Q, E, A_qk, T, diagonal, weakest = _prepare_tile(
            A_qk, T, q_ptr, k_ptr, g_ptr, b_ptr, rate_ptr, delta_ptr, K_tail_ptr, gamma_ptr, before_ptr, after_ptr,
            token, rows, n, head, unit, tl.arange(0, BK), scale, shorter_q, shorter_k, largest_erase,
            H, K, KP, DG, DB, C, LOG_C, RANGE, DT, PREC, SAVE, ACT, STRONG,
        )  # fmt: skip
        tl.store(Q_ptr + offsets(rows, tl.arange(0, BK), KP), Q)
    else:
        diagonal = tl.zeros((C,), tl.float32)
        weakest = 0.0
        for first in tl.range(0, KP, BK):
            cols = first + tl.arange(0, BK)
            Q, E, A_qk, T, products, least = _prepare_tile(
                A_qk, T, q_ptr, k_ptr, g_ptr, b_ptr, rate_ptr, delta_ptr, K_tail_ptr, gamma_ptr, before_ptr, after_ptr,
                token, rows, n, head, unit, cols, scale, shorter_q, shorter_k, largest_erase,
                H, K, KP, DG, DB, C, LOG_C, RANGE, DT, PREC, SAVE, ACT, STRONG,
            )  # fmt: skip
            tile = offsets(rows, cols, KP)
            tl.store(Q_ptr + tile, Q)
            if ERASE:
                tl.store(Y_ptr + tile, E)
            diagonal += products
            weakest = tl.minimum(weakest, least)
    if not STRONG:
        strong = weakest < -RANGE
        tl.store(strong_ptr + tl.program_id(0), strong.to(tl.int8))
        if strong:
            return
    below = rows[:, None] > rows[None, :]
    A_qk = tl.where(below, A_qk, tl.where(rows[:, None] == rows[None, :], diagonal[:, None], 0.0)).to(DT)
    square = offsets(rows, rows, C)
    tl.store((A_qk_ptr + unit * C * C) + square, A_qk)
    A = A_qk
    if ERASE:
        A = unit_lower_inverse(tl.where(below, T, 0.0), LOG_C, SOLVE).to(DT)
        if SAVE:
            tl.store((A_ptr + unit * C * C) + square, A)
    if ERASE:
        if WHOLE:
            tl.store(Y_ptr + offsets(rows, tl.arange(0, BK), KP), product(A, E, DT, PREC).to(DT))
        else:
            tl.debug_barrier()
            for first in tl.range(0, KP, BK):
                tile = offsets(rows, first + tl.arange(0, BK), KP)
                Y = product(A, tl.load(Y_ptr + tile), DT, PREC).to(DT)
                tl.debug_barrier()
                tl.store(Y_ptr + tile, Y)

    if ONE:
        U = product(A, Z, DT, PREC).to(DT) if ERASE else Z
        tl.store((U_ptr + unit * C * VP) + offsets(rows, tl.arange(0, BV), VP), U)
    else:
        for part in tl.range(0, GROUP * (VP // BV)):
            value_head = head * GROUP + part // (VP // BV)
            values = (part % (VP // BV)) * BV + tl.arange(0, BV)
            Z = _written(v_ptr, w_ptr, token, rows, n, value_head, values, largest_write, HV, V, DW, DT, ACT)
            U = product(A, Z, DT, PREC).to(DT) if ERASE else Z
            tl.store((U_ptr + (chunk.to(tl.int64) * HV + value_head) * C * VP) + offsets(rows, values, VP), U)


@triton.jit
def scan_chunks(
    Y_ptr, Q_ptr, K_tail_ptr, gamma_ptr, before_ptr, U_ptr, A_qk_ptr, S_first_ptr,
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
    first_state, state = (sequence.to(tl.int64) * HV + value_head) * K * V, offsets(keys, cols, V)
    inside = (keys[:, None] < K) & (cols[None, :] < V)
    start, end = tl.load(start_ptr + sequence), tl.load(start_ptr + sequence + 1)
    first, last = tl.load(first_chunk_ptr + sequence), tl.load(first_chunk_ptr + sequence + 1)
    by_key, by_value, by_state = offsets(rows, keys, KP), offsets(rows, cols, VP), offsets(keys, cols, VP)
    square = offsets(rows, rows, C)

    S = tl.zeros((KP, BV), tl.float32)
    if FIRST:
        S += tl.load((S_first_ptr + first_state) + state, mask=inside, other=0.0)
    for step in tl.range(0, last - first, num_stages=STAGES):
        key_unit, value_unit = (first.to(tl.int64) + step) * H + head, (first.to(tl.int64) + step) * HV + value_head
        Q = tl.load((Q_ptr + key_unit * C * KP) + by_key)
        A_qk = tl.load((A_qk_ptr + key_unit * C * C) + square)
        K_tail = tl.load((K_tail_ptr + key_unit * C * KP) + by_key)
        gamma = tl.load(gamma_ptr + key_unit * KP + keys)
        R = tl.load((U_ptr + value_unit * C * VP) + by_value)
        S_low = S.to(DT)
        if SAVE:
            before = tl.load(before_ptr + key_unit * KP + keys)
            tl.store((S_ptr + value_unit * KP * VP) + by_state, (S * before[:, None]).to(DT))
        if ERASE:
            Y = tl.load((Y_ptr + key_unit * C * KP) + by_key)
            R = (R.to(tl.float32) - product(Y, S_low, DT, PREC)).to(DT)
            if SAVE:
                tl.store((R_ptr + value_unit * C * VP) + by_value, R)
        o = tl.dot(A_qk, R, product(Q, S_low, DT, PREC), input_precision=PREC)
        token = start + step * C
        store_token_tile(o_ptr, o, token, rows, end - token, value_head, HV, V, cols)
        S = S * gamma[:, None] + product(tl.trans(K_tail), R, DT, PREC)
    if LAST:
        tl.store((S_last_ptr + first_state) + state, S, mask=inside)
