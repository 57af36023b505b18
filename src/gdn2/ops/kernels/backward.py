"""Backward kernels: `scan_back` (chunks in reverse), `value_gradients` and `key_gradients` (all chunks in parallel).

With dS' the gradient of the state after a chunk and the legend of `forward.py`, equations (53-72) reduce to

    dX = A_out^T dO + K_out dS'      dS = gamma_C * dS' + Q^T dO - E^T dX                  (scan; A^T of 54 and 57; 64)
    dZ = dX    dV = w * dZ    dW = v * dZ                                                          (64, 73-74)
    dA_qk = tril(dO R^T)    -dT = tril(dZ R^T, -1)      (= tril(A^T dA A^T), since A^T dA A^T = dZ R^T)    (53, 66)
    dQ = gamma * (dO S^T) + ratios of dA_qk with k      dE = -gamma * (dZ S^T) + ratios of dT with k
    dK' = gamma_C/gamma * (R dS'^T) + ratios of dA_qk^T with q and of dT^T with e                  (55-72)
    dG_r = q dQ + e dE - k dK'    dg_i = sum_{r >= i} dG_r + gamma_C rowsum(dS' * S) + sum_r k_r dK_tail_r   (76-82)

with R = A X, which is never formed: dO R^T = (dO X^T) A^T and R dS'^T = A (X dS'^T). "Ratios of M with k" are, per
channel, sum_s M_rs gamma_r/gamma_s k_s. The pair r = s carries no decay: it is left out of dG, where it would cancel,
and added to dQ and dK' afterwards. Shapes and constants are those of `forward.py`.

With ACT the gradients are those of what the layer projected. The norms of q and k need <q, dq> and <k, dk> of each row.
The output is linear in q, so <q, dq> = <o, dO>; the state after a token is linear in k for a given r = z - R, and r is
linear in e, so <k, dk> = <R, dZ> - <Z - R, dZ>: sums over value channels, which `value_gradients` has at hand. <R, dZ>
is the diagonal of dZ R^T.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from gdn2.ops.kernels.inputs import (
    decay_gradient,
    decay_tile,
    inverse_length,
    opened,
    opened_gradient,
)
from gdn2.ops.kernels.maths import exp, exp_anew, inverse_exp_anew, settled
from gdn2.ops.kernels.tiles import (
    add_up,
    block_sums,
    from_middle,
    gate_tile,
    half_pair,
    offsets,
    product,
    same_block,
    scratch_tile,
    store_token_tile,
    token_tile,
)


@triton.jit
def scan_back(
    E_ptr, Q_ptr, K_out_ptr, gamma_ptr, after_ptr, A_out_ptr, do_ptr, dS_last_ptr,
    dS_first_ptr, dS_ptr, dZ_ptr,
    start_ptr, first_chunk_ptr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
    ERASE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One sequence, one value head, BV value channels, last chunk first: dZ = dX and `after` * dS' of every chunk.

    LAST says whether a gradient of the final state comes in, FIRST whether that of the initial state is wanted.
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

    dS = tl.zeros((KP, BV), tl.float32)
    if LAST:
        dS += tl.load((dS_last_ptr + first_state) + state, mask=inside, other=0.0)
    for step in tl.range(0, last - first, num_stages=STAGES):
        chunk = last.to(tl.int64) - 1 - step
        key_unit, value_unit = chunk * H + head, chunk * HV + value_head
        token = start + (chunk - first) * C
        Q = tl.load((Q_ptr + key_unit * C * KP) + by_key)
        A_out = tl.load((A_out_ptr + key_unit * C * C) + square)
        K_out = tl.load((K_out_ptr + key_unit * C * KP) + by_key)
        gamma = tl.load(gamma_ptr + key_unit * KP + keys)
        do = token_tile(do_ptr, token, rows, end - token, value_head, HV, V, first_value, BV).to(DT)
        after = tl.load(after_ptr + key_unit * KP + keys)
        tl.store((dS_ptr + value_unit * KP * VP) + by_state, (dS * after[:, None]).to(DT))
        dS_low = dS.to(DT)
        dX = tl.dot(tl.trans(A_out), do, product(K_out, dS_low, DT, PREC), input_precision=PREC).to(DT)
        tl.store((dZ_ptr + value_unit * C * VP) + by_value, dX)
        dS = dS * gamma[:, None] + product(tl.trans(Q), do, DT, PREC)
        if ERASE:
            E = tl.load((E_ptr + key_unit * C * KP) + by_key)
            dS -= product(tl.trans(E), dX, DT, PREC)
    if FIRST:
        tl.store((dS_first_ptr + first_state) + state, dS, mask=inside)


@triton.jit
def value_gradients(
    v_ptr, w_ptr, o_ptr, do_ptr, dZ_ptr, X_ptr, A_ptr,
    dv_ptr, dw_ptr, dA_qk_ptr, diagonal_ptr, minus_dT_ptr, along_q_ptr, along_k_ptr,
    token_ptr, length_ptr, largest_write,
    H: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, DW: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, SOLVE: tl.constexpr,
    ERASE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """One chunk of the value heads of one key head: dV, dW, and dA_qk and -dT summed.

    dA_qk is stored without its diagonal, which goes to a vector of its own [M, H, C]. With ACT also <q, dq> and
    <k, dk>, of the same shape.
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    n = tl.load(length_ptr + chunk)
    if n == 0:
        return
    token = tl.load(token_ptr + chunk)
    rows = tl.arange(0, C)
    unit = tl.program_id(0).to(tl.int64)
    square = offsets(rows, rows, C)
    dA_qk = tl.zeros((C, C), tl.float32)
    minus_dT = tl.zeros((C, C), tl.float32)
    along_q = tl.zeros((C,), tl.float32)
    along_k = tl.zeros((C,), tl.float32)
    for member in tl.range(0, HV // H):
        value_head = head * (HV // H) + member
        dw_shared = tl.zeros((C,), tl.float32)
        for first in tl.range(0, VP, BV):
            cols = first + tl.arange(0, BV)
            value_unit = chunk.to(tl.int64) * HV + value_head
            tile = offsets(rows, cols, VP)
            do = token_tile(do_ptr, token, rows, n, value_head, HV, V, first, BV).to(DT)
            X = tl.load((X_ptr + value_unit * C * VP) + tile)
            dA_qk = tl.dot(do, tl.trans(X), dA_qk, input_precision=PREC)
            dZ = tl.load((dZ_ptr + value_unit * C * VP) + tile)
            if ERASE:
                minus_dT = tl.dot(dZ, tl.trans(X), minus_dT, input_precision=PREC)
            dZ = dZ.to(tl.float32)
            if ACT:
                o = token_tile(o_ptr, token, rows, n, value_head, HV, V, first, BV)
                along_q += tl.sum(o * do.to(tl.float32), 1)
                if not ERASE:
                    along_k += tl.sum(X.to(tl.float32) * dZ, 1)
            if DW == 0 and not (ACT and ERASE):
                store_token_tile(dv_ptr, dZ, token, rows, n, value_head, HV, V, cols)
            else:
                v = token_tile(v_ptr, token, rows, n, value_head, HV, V, first, BV)
                w = gate_tile(w_ptr, token, rows, n, value_head, HV, DW, first, BV, 1.0)
                w = opened(w, largest_write, DT, ACT and DW != 0)
                store_token_tile(dv_ptr, dZ * w, token, rows, n, value_head, HV, V, cols)
                dw = dZ * v
                if ACT and ERASE:
                    along_k -= tl.sum(dw * w, 1)
                if DW == 1:
                    dw_shared += tl.sum(dw, 1)
                elif DW != 0:
                    dw = opened_gradient(dw, w, largest_write, ACT)
                    store_token_tile(dw_ptr, dw, token, rows, n, value_head, HV, V, cols)
        if DW == 1:
            at = token * HV + value_head + rows * HV
            w = opened(tl.load(w_ptr + at, mask=rows < n, other=0.0).to(tl.float32), largest_write, DT, ACT)
            dw_shared = opened_gradient(dw_shared, w, largest_write, ACT)
            tl.store(dw_ptr + at, dw_shared.to(dw_ptr.dtype.element_ty), mask=rows < n)
    below, diagonal = rows[:, None] > rows[None, :], rows[:, None] == rows[None, :]
    if ERASE:
        A_T = tl.trans(tl.load((A_ptr + unit * C * C) + square).to(tl.float32))
        dA_qk = tl.dot(dA_qk, A_T, input_precision=SOLVE)
        minus_dT = tl.dot(minus_dT, A_T, input_precision=SOLVE)
        if ACT:
            along_k += 2.0 * tl.sum(tl.where(diagonal, minus_dT, 0.0), 1)
        tl.store((minus_dT_ptr + unit * C * C) + square, tl.where(below, minus_dT, 0.0).to(DT))
    tl.store((dA_qk_ptr + unit * C * C) + square, tl.where(below, dA_qk, 0.0).to(DT))
    tl.store(diagonal_ptr + unit * C + rows, tl.sum(tl.where(diagonal, dA_qk, 0.0), 1))
    if ACT:
        tl.store(along_q_ptr + unit * C + rows, along_q)
        tl.store(along_k_ptr + unit * C + rows, along_k)


@triton.jit
def _strong_pair_gradients(
    q, e, k, dA_qk, minus_dT, g, g_next, rows,
    LOG_C: tl.constexpr, ERASE: tl.constexpr, RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What all pairs r > s of a strong chunk give to dq, de and dk, with their decay ratios (68-71)."""
    dq = tl.zeros(q.shape, tl.float32)
    de = tl.zeros(q.shape, tl.float32)
    dk = tl.zeros(q.shape, tl.float32)
    level = tl.full((), LOG_C, tl.int32)
    P, X = tl.cumsum(g, 0), tl.zeros(q.shape, tl.float32)
    unfinished = True
    while unfinished:
        unfinished = tl.min(P) < -RANGE
        if unfinished:
            level -= 1
            P, X = block_sums(g, g_next, rows, level)
            mask = half_pair(rows, level)
        else:
            X = -P
            mask = same_block(rows, level)
        late, early = exp(P, DT), exp(X, DT)
        k_early = (k * early).to(DT)
        below = tl.where(mask, dA_qk, 0.0).to(DT)
        dq += product(below, k_early, DT, PREC) * late
        from_later = product(tl.trans(below), q * late, DT, PREC)
        if ERASE:
            below = tl.where(mask, minus_dT, 0.0).to(DT)
            de -= product(below, k_early, DT, PREC) * late
            from_later -= product(tl.trans(below), e * late, DT, PREC)
        dk += from_later * early
        P = tl.where(level == 0, 0.0, P)
    return dq, de, dk


@triton.jit
def _times_state(
    total, rows_ptr, state_ptr, chunk, head, first_key, rows, n, token,
    HV: tl.constexpr, GROUP: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Adds rows state^T [C, BK], summed over the value heads of a key head, to `total`.

    BY_TOKEN says whether the rows lie in a [tokens, HV, V] tensor or in chunk-major scratch.
    """
    for part in tl.range(0, GROUP * (VP // BV), num_stages=STAGES):
        value_head = head * GROUP + part // (VP // BV)
        first = (part % (VP // BV)) * BV
        unit = chunk.to(tl.int64) * HV + value_head
        state = scratch_tile(state_ptr, unit, KP, VP, first_key, BK, first, BV)
        if BY_TOKEN:
            left = token_tile(rows_ptr, token, rows, n, value_head, HV, V, first, BV).to(DT)
        else:
            left = scratch_tile(rows_ptr, unit, C, VP, 0, C, first, BV)
        total = tl.dot(left, tl.trans(state), total, input_precision=PREC)
    return total


@triton.jit
def _state_overlap(
    S_ptr, dS_ptr, chunk, head, first_key,
    HV: tl.constexpr, GROUP: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """rowsum(S * dS') [BK] over the value heads of a key head (60)."""
    total = tl.zeros((BK,), tl.float32)
    for part in tl.range(0, GROUP * (VP // BV), num_stages=STAGES):
        unit, first = chunk.to(tl.int64) * HV + head * GROUP + part // (VP // BV), (part % (VP // BV)) * BV
        S = scratch_tile(S_ptr, unit, KP, VP, first_key, BK, first, BV)
        dS = scratch_tile(dS_ptr, unit, KP, VP, first_key, BK, first, BV)
        total += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    return total


@triton.jit
def key_gradients(
    q_ptr, k_ptr, g_ptr, b_ptr, do_ptr, dZ_ptr, X_ptr, S_ptr, dS_ptr, A_ptr, rate_ptr, delta_ptr,
    dA_qk_ptr, diagonal_ptr, minus_dT_ptr, along_q_ptr, along_k_ptr,
    dq_ptr, dk_ptr, dg_ptr, db_ptr, drate_ptr, ddelta_ptr,
    token_ptr, length_ptr, strong_ptr, scale, largest_erase, eps,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    DG: tl.constexpr, DB: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, SPAN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
    RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ACT: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """One chunk of SPAN channels of one key head, summed over its value heads: dq, dk, d log-decay and d erase.

    Like `prepare_chunks` it is launched once for the ordinary and once for the strong chunks. With ACT also this
    chunk's share of drate [M, H, KP / SPAN] and ddelta [M, H, K].
    """
    PARTS: tl.constexpr = KP // SPAN
    part, unit = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    chunk, head = unit // H, unit % H
    n = tl.load(length_ptr + chunk)
    if n == 0:
        return
    if (tl.load(strong_ptr + unit) != 0) != STRONG:
        return
    token = tl.load(token_ptr + chunk)
    unit = unit.to(tl.int64)
    rows = tl.arange(0, C)
    ERASE: tl.constexpr = DB != 0
    GROUP: tl.constexpr = HV // H
    dA_qk_ptr, minus_dT_ptr = dA_qk_ptr + unit * C * C, minus_dT_ptr + unit * C * C
    square = offsets(rows, rows, C)
    # Nothing decays after the last token: left out of dG, where it would cancel to rounding noise.
    decays = (rows < n - 1)[:, None]
    diagonal = tl.load(diagonal_ptr + unit * C + rows)[:, None]
    shorter_q = inverse_length(q_ptr, token, rows, n, head, eps, H, K, KP, BK, ACT)
    shorter_k = inverse_length(k_ptr, token, rows, n, head, eps, H, K, KP, BK, ACT)

    dg_shared = tl.zeros((C,), tl.float32)
    db_shared = tl.zeros((C,), tl.float32)
    drate = 0.0
    for block in tl.range(SPAN // BK):
        first = part * SPAN + block * BK
        keys = first + tl.arange(0, BK)
        # dk, de and dq come one after the other, and what they share is loaded and computed again for each: few tiles
        # are alive at once.
        g = decay_tile(g_ptr, rate_ptr, delta_ptr, token, rows, n, head, H, K, DG, first, BK, DT, ACT)
        decayed = tl.zeros((BK,), tl.float32)
        if DG != 0:
            decayed = _state_overlap(S_ptr, dS_ptr, chunk, head, first, HV, GROUP, KP, VP, BK, BV, STAGES)
        if STRONG:
            g_next = decay_tile(g_ptr, rate_ptr, delta_ptr, token, rows + 1, n, head, H, K, DG, first, BK, DT, ACT)
            late_sum, early_sum = tl.cumsum(g, 0), tl.cumsum(g_next, 0, reverse=True)
            decayed *= exp(tl.sum(g, 0), DT)
        else:
            late_sum = add_up(from_middle(rows, C), g, DT, PREC)
            late_sum = settled(late_sum)

        k = token_tile(k_ptr, token, rows, n, head, H, K, first, BK) * shorter_k
        q = token_tile(q_ptr, token, rows, n, head, H, K, first, BK) * (shorter_q * scale)
        dA_qk = tl.load(dA_qk_ptr + square)
        dk = _times_state(
            tl.zeros((C, BK), tl.float32), X_ptr, dS_ptr, chunk, head, first, rows, n, token,
            HV, GROUP, V, KP, VP, C, BK, BV, STAGES, DT, PREC, False,
        )  # fmt: skip
        if ERASE:
            dk = product(tl.load((A_ptr + unit * C * C) + square), dk, DT, PREC)
        early = exp(early_sum, DT) if STRONG else inverse_exp_anew(late_sum, DT)
        decayed += tl.sum(tl.where(decays, k * early * dk, 0.0), 0)
        if STRONG:
            e, minus_dT = k, dA_qk
            if ERASE:
                b = opened(gate_tile(b_ptr, token, rows, n, head, H, DB, first, BK, 0.0), largest_erase, DT, ACT)
                e, minus_dT = k * b, tl.load(minus_dT_ptr + square)
            near_q, near_e, near_k = _strong_pair_gradients(
                q, e, k, dA_qk, minus_dT, g, g_next, rows, LOG_C, ERASE, RANGE, DT, PREC
            )
            dk = dk * exp(early_sum, DT) + near_k
        else:
            late = exp_anew(late_sum, DT)
            dk = tl.dot(tl.trans(dA_qk), (q * late).to(DT), dk, input_precision=PREC)
            if ERASE:
                b = opened(gate_tile(b_ptr, token, rows, n, head, H, DB, first, BK, 0.0), largest_erase, DT, ACT)
                minus_dT = tl.load(minus_dT_ptr + square)
                dk = tl.dot(tl.trans(minus_dT), (-(k * b) * late).to(DT), dk, input_precision=PREC)
            dk *= inverse_exp_anew(late_sum, DT)
        dG = settled(tl.where(decays, -k * dk, 0.0))
        dk = settled(dk + diagonal * q)
        tl.debug_barrier()  # loads before and after it are not merged

        if ERASE:
            k = token_tile(k_ptr, token, rows, n, head, H, K, first, BK) * shorter_k
            minus_dT = tl.load(minus_dT_ptr + square)
            minus_de = _times_state(
                tl.zeros((C, BK), tl.float32), dZ_ptr, S_ptr, chunk, head, first, rows, n, token,
                HV, GROUP, V, KP, VP, C, BK, BV, STAGES, DT, PREC, False,
            )  # fmt: skip
            if STRONG:
                minus_de = minus_de * exp(late_sum, DT) - near_e
            else:
                minus_de += add_up(minus_dT, k * inverse_exp_anew(late_sum, DT), DT, PREC)
                minus_de *= exp_anew(late_sum, DT)
            b = opened(gate_tile(b_ptr, token, rows, n, head, H, DB, first, BK, 0.0), largest_erase, DT, ACT)
            dk -= b * minus_de
            db = -k * minus_de
            dG = settled(dG + b * db)
            if DB == 1:
                db_shared += tl.sum(db, 1)
            else:
                db = opened_gradient(db, b, largest_erase, ACT)
                store_token_tile(db_ptr, db, token, rows, n, head, H, K, keys)
            if ACT:
                dk -= k * tl.load(along_k_ptr + unit * C + rows)[:, None]
        elif ACT:
            dk -= k * tl.load(along_k_ptr + unit * C + rows)[:, None]
        store_token_tile(dk_ptr, dk * shorter_k, token, rows, n, head, H, K, keys)
        tl.debug_barrier()

        k = token_tile(k_ptr, token, rows, n, head, H, K, first, BK) * shorter_k
        dA_qk = tl.load(dA_qk_ptr + square)
        dq = _times_state(
            tl.zeros((C, BK), tl.float32), do_ptr, S_ptr, chunk, head, first, rows, n, token,
            HV, GROUP, V, KP, VP, C, BK, BV, STAGES, DT, PREC, True,
        )  # fmt: skip
        if STRONG:
            dq = dq * exp(late_sum, DT) + near_q
        else:
            dq = (dq + add_up(dA_qk, k * inverse_exp_anew(late_sum, DT), DT, PREC)) * exp_anew(late_sum, DT)
        q = token_tile(q_ptr, token, rows, n, head, H, K, first, BK) * (shorter_q * scale)
        dG += q * dq
        dq = (dq + diagonal * k) * scale
        if ACT:
            dq -= q * (tl.load(along_q_ptr + unit * C + rows) / scale)[:, None]
        store_token_tile(dq_ptr, dq * shorter_q, token, rows, n, head, H, K, keys)
        if DG != 0:
            dg = add_up(tl.where(rows[:, None] <= rows[None, :], 1.0, 0.0), dG, DT, PREC) + decayed[None, :]
            if DG == 1:
                dg_shared += tl.sum(dg, 1)
            else:
                if ACT:
                    dg, one = decay_gradient(
                        dg, g_ptr, rate_ptr, delta_ptr, token, rows, n, head, H, K, DG, first, BK, DT
                    )
                    drate += one
                    tl.store(ddelta_ptr + unit * K + keys, tl.sum(dg, 0), mask=keys < K)
                store_token_tile(dg_ptr, dg, token, rows, n, head, H, K, keys)
    shared = token * H + head + rows * H
    if DG == 1:
        if ACT:
            dg_shared, drate = decay_gradient(
                dg_shared[:, None], g_ptr, rate_ptr, delta_ptr, token, rows, n, head, H, K, DG, 0, 1, DT
            )
            dg_shared = tl.sum(dg_shared, 1)
            tl.store(ddelta_ptr + unit, tl.sum(dg_shared))
        tl.store(dg_ptr + shared, dg_shared.to(dg_ptr.dtype.element_ty), mask=rows < n)
    if DB == 1:
        b_shared = opened(tl.load(b_ptr + shared, mask=rows < n, other=0.0).to(tl.float32), largest_erase, DT, ACT)
        db_shared = opened_gradient(db_shared, b_shared, largest_erase, ACT)
        tl.store(db_ptr + shared, db_shared.to(db_ptr.dtype.element_ty), mask=rows < n)
    if ACT and DG != 0:
        tl.store(drate_ptr + tl.program_id(0), drate)
