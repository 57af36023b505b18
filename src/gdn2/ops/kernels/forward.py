"""Forward kernels: `prepare_chunks` (all chunks in parallel), then `scan_chunks` (chunks in order, state on chip).

Legend, as in `reference.py` with the paper's symbols inside a chunk: S is the state before the chunk, E = gamma * b * k
(the paper's Ebar), Q = gamma * scale * q (Q_gamma), Z = w * v, K_tail = (gamma_C / gamma) * k, A = (I + T)^-1. The
paper solves for R = A (Z - E S) and uses R twice (22-25, 35). Here A goes to where R is used,

    A_out = A_qk A    K_out = A^T K_tail
    X = Z - E S       O = Q S + A_out X      S <- gamma_C * S + K_out^T X

so that X is the only thing that is rounded between S and S: rows of R cancel where keys repeat, and rounding errors do
not. A_out and K_out are formed from float32 (tf32) operands for the same reason.

Scratch is chunk-major, [chunks, heads, C, padded head size], in the operand type DT; rows past a sequence's end are
zero. KP and VP are the head sizes padded to a power of two. DG, DB and DW are the last axes of log-decay, erase and
write: 0 when there is no such gate, 1 when it is shared by the channels.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from gdn2.ops.kernels.inputs import decay_tile, inverse_length, opened, written
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
def _key_tail(
    k_ptr, g_ptr, rate_ptr, delta_ptr, token, rows, n, head, first, shorter_k,
    H: tl.constexpr, K: tl.constexpr, DG: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
    ACT: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """BK channels of K_tail, in float32."""
    k = token_tile(k_ptr, token, rows, n, head, H, K, first, BK) * shorter_k
    if STRONG:
        g_next = decay_tile(g_ptr, rate_ptr, delta_ptr, token, rows + 1, n, head, H, K, DG, first, BK, DT, ACT)
        left = tl.cumsum(g_next, 0, reverse=True)
    else:
        g = decay_tile(g_ptr, rate_ptr, delta_ptr, token, rows, n, head, H, K, DG, first, BK, DT, ACT)
        left = add_up(tl.where(rows[None, :] > rows[:, None], 1.0, 0.0), g, DT, PREC)
    return k * exp(left, DT)


@triton.jit
def _prepare_tile(
    A_qk, T, q_ptr, k_ptr, g_ptr, b_ptr, rate_ptr, delta_ptr, Q_ptr, E_ptr, gamma_ptr, before_ptr, after_ptr,
    token, rows, n, head, unit, first, scale, shorter_q, shorter_k, largest_erase,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, DG: tl.constexpr, DB: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
    RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, SOLVE: tl.constexpr, SAVE: tl.constexpr,
    ACT: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """BK channels of a chunk: A_qk and T with what these add below the diagonal (and, unless STRONG, trash on
    and above it), diag(q k^T), and the largest decay. Q, E, gamma_C and the decays of the halves are stored.
    """
    ERASE: tl.constexpr = DB != 0
    g = decay_tile(g_ptr, rate_ptr, delta_ptr, token, rows, n, head, H, K, DG, first, BK, DT, ACT)
    weakest = 0.0
    if STRONG:
        g_next = decay_tile(g_ptr, rate_ptr, delta_ptr, token, rows + 1, n, head, H, K, DG, first, BK, DT, ACT)
        before = tl.full((BK,), 1.0, tl.float32)
        after = before
        gamma_C = exp(tl.sum(g, 0), DT)
    else:
        before = tl.sum(tl.where(rows[:, None] < C // 2, g, 0.0), 0)
        after = tl.sum(tl.where(rows[:, None] < C // 2, 0.0, g), 0)
        weakest = tl.min(tl.minimum(before, after))
        before, after = exp(before, DT), exp(after, DT)
        gamma_C = before * after
        D = settled(add_up(from_middle(rows, C), g, DT, PREC))
    k = token_tile(k_ptr, token, rows, n, head, H, K, first, BK) * shorter_k
    q = token_tile(q_ptr, token, rows, n, head, H, K, first, BK) * (shorter_q * scale)
    diagonal = tl.sum(q * k, 1)
    e = (
        k * opened(gate_tile(b_ptr, token, rows, n, head, H, DB, first, BK, 0.0), largest_erase, DT, ACT)
        if ERASE
        else q
    )
    if STRONG:
        A_qk, T = _strong_scores(q, e, k, g, g_next, A_qk, T, rows, LOG_C, ERASE, RANGE, DT, PREC)
        gamma = exp(tl.cumsum(g, 0), DT)
        Q, E = q * gamma, e * gamma
    else:
        # A_qk takes k in two parts: where keys repeat its rows meet values that cancel, and rounded keys would not.
        early = k * inverse_exp_anew(D, DT)
        high = early.to(DT)
        low = (early - high.to(tl.float32)).to(DT)
        Q = (q * exp_anew(D, DT)).to(DT)
        A_qk = tl.dot(Q, tl.trans(high), A_qk, input_precision=PREC)
        if tl.float32 != DT:
            A_qk = tl.dot(Q, tl.trans(low), A_qk)
        E = Q
        if ERASE:
            E = (e * exp_anew(D, DT)).to(DT)
            T = tl.dot(E, tl.trans(high), T, input_precision=PREC)
        Q, E = Q * before[None, :], E * before[None, :]
    cols = first + tl.arange(0, BK)
    tile = offsets(rows, cols, KP)
    tl.store(Q_ptr + tile, Q.to(DT))
    if ERASE:
        tl.store(E_ptr + tile, E.to(DT))
    vector = unit * KP
    tl.store(gamma_ptr + vector + cols, gamma_C)
    if SAVE:
        tl.store(before_ptr + vector + cols, before)
        tl.store(after_ptr + vector + cols, after)
    return A_qk, T, diagonal, weakest


@triton.jit
def prepare_chunks(
    q_ptr, k_ptr, v_ptr, g_ptr, b_ptr, w_ptr, rate_ptr, delta_ptr,
    E_ptr, Q_ptr, K_out_ptr, gamma_ptr, before_ptr, after_ptr, Z_ptr, A_ptr, A_out_ptr,
    token_ptr, length_ptr, strong_ptr, scale, largest_erase, largest_write, eps,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    DG: tl.constexpr, DB: tl.constexpr, DW: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, SOLVE: tl.constexpr, SAVE: tl.constexpr,
    ACT: tl.constexpr, READY: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head: everything of the legend that does not need S; A too when SAVE, and Z when READY.

    The launch with STRONG unset marks the strong chunks and leaves their keys to the one with STRONG.
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    n = tl.load(length_ptr + chunk)
    if n == 0:
        return
    if STRONG and tl.load(strong_ptr + tl.program_id(0)) == 0:
        return
    token = tl.load(token_ptr + chunk)
    unit = tl.program_id(0).to(tl.int64)
    E_ptr, Q_ptr, K_out_ptr = E_ptr + unit * C * KP, Q_ptr + unit * C * KP, K_out_ptr + unit * C * KP
    rows = tl.arange(0, C)
    ERASE: tl.constexpr = DB != 0
    GROUP: tl.constexpr = HV // H
    shorter_q = inverse_length(q_ptr, token, rows, n, head, eps, H, K, KP, BK, ACT)
    shorter_k = inverse_length(k_ptr, token, rows, n, head, eps, H, K, KP, BK, ACT)
    A_qk = tl.zeros((C, C), tl.float32)
    T = tl.zeros((C, C), tl.float32)
    diagonal = tl.zeros((C,), tl.float32)
    weakest = 0.0
    for first in tl.range(0, KP, BK):
        A_qk, T, products, least = _prepare_tile(
            A_qk, T, q_ptr, k_ptr, g_ptr, b_ptr, rate_ptr, delta_ptr, Q_ptr, E_ptr, gamma_ptr, before_ptr, after_ptr,
            token, rows, n, head, unit, first, scale, shorter_q, shorter_k, largest_erase,
            H, K, KP, DG, DB, C, LOG_C, BK, RANGE, DT, PREC, SOLVE, SAVE, ACT, STRONG,
        )  # fmt: skip
        diagonal += products
        weakest = tl.minimum(weakest, least)
    if not STRONG:
        strong = weakest < -RANGE
        tl.store(strong_ptr + tl.program_id(0), strong.to(tl.int8))
        if strong:
            return
    below = rows[:, None] > rows[None, :]
    A_qk = tl.where(below, A_qk, tl.where(rows[:, None] == rows[None, :], diagonal[:, None], 0.0))
    square = offsets(rows, rows, C)
    A = A_qk
    if ERASE:
        A = unit_lower_inverse(tl.where(below, T, 0.0), LOG_C, SOLVE)
        if SAVE:
            tl.store((A_ptr + unit * C * C) + square, A.to(DT))
        A_qk = tl.dot(A_qk, A, input_precision=SOLVE)
    tl.store((A_out_ptr + unit * C * C) + square, A_qk.to(DT))
    # K_tail is computed here and not beside Q and E: kept until A is known it would fill the registers.
    for first in tl.range(0, KP, BK):
        K_out = _key_tail(
            k_ptr, g_ptr, rate_ptr, delta_ptr, token, rows, n, head, first, shorter_k,
            H, K, DG, BK, DT, PREC, ACT, STRONG,
        )  # fmt: skip
        if ERASE:
            K_out = tl.dot(tl.trans(A), K_out, input_precision=SOLVE)
        tl.store(K_out_ptr + offsets(rows, first + tl.arange(0, BK), KP), K_out.to(DT))
    if READY:
        for part in tl.range(0, GROUP * (VP // BV)):
            value_head = head * GROUP + part // (VP // BV)
            first = (part % (VP // BV)) * BV
            Z = written(v_ptr, w_ptr, token, rows, n, value_head, first, largest_write, HV, V, BV, DW, DT, ACT)
            at = (chunk.to(tl.int64) * HV + value_head) * C * VP
            tl.store((Z_ptr + at) + offsets(rows, first + tl.arange(0, BV), VP), Z.to(DT))


@triton.jit
def scan_chunks(
    v_ptr, w_ptr, E_ptr, Q_ptr, K_out_ptr, gamma_ptr, before_ptr, Z_ptr, A_out_ptr, S_first_ptr,
    o_ptr, S_last_ptr, S_ptr,
    start_ptr, first_chunk_ptr, largest_write,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    DW: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
    ERASE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, SAVE: tl.constexpr,
    ACT: tl.constexpr, READY: tl.constexpr,
):  # fmt: skip
    """One sequence, one value head, BV value channels: the third line of the legend, chunk after chunk.

    FIRST and LAST say whether there is an initial state and whether the final one is wanted; SAVE keeps X, in the place
    of Z, and `before` * S of every chunk for the backward. READY says that Z was prepared, which SAVE needs: reading v
    and w here is faster, but does not fit into shared memory beside what SAVE takes.
    """
    PARTS: tl.constexpr = VP // BV
    sequence, value_head = tl.program_id(0) // (PARTS * HV), tl.program_id(0) // PARTS % HV
    head = value_head // (HV // H)
    rows, keys = tl.arange(0, C), tl.arange(0, KP)
    first_value = (tl.program_id(0) % PARTS) * BV
    cols = first_value + tl.arange(0, BV)
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
        A_out = tl.load((A_out_ptr + key_unit * C * C) + square)
        K_out = tl.load((K_out_ptr + key_unit * C * KP) + by_key)
        gamma = tl.load(gamma_ptr + key_unit * KP + keys)
        token = start + step * C
        if READY:
            X = tl.load((Z_ptr + value_unit * C * VP) + by_value).to(tl.float32)
        else:
            X = written(
                v_ptr, w_ptr, token, rows, end - token, value_head, first_value, largest_write, HV, V, BV, DW, DT, ACT
            )
        S_low = S.to(DT)
        if SAVE:
            before = tl.load(before_ptr + key_unit * KP + keys)
            tl.store((S_ptr + value_unit * KP * VP) + by_state, (S * before[:, None]).to(DT))
        if ERASE:
            E = tl.load((E_ptr + key_unit * C * KP) + by_key)
            X -= product(E, S_low, DT, PREC)
        X = X.to(DT)
        if SAVE:
            tl.store((Z_ptr + value_unit * C * VP) + by_value, X)
        o = tl.dot(A_out, X, product(Q, S_low, DT, PREC), input_precision=PREC)
        store_token_tile(o_ptr, o, token, rows, end - token, value_head, HV, V, cols)
        S = S * gamma[:, None] + product(tl.trans(K_out), X, DT, PREC)
    if LAST:
        tl.store((S_last_ptr + first_state) + state, S, mask=inside)
