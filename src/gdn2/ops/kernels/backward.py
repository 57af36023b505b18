"""Backward kernels: `scan_back` (chunks in reverse), `value_gradients` and `key_gradients` (all chunks in parallel).

With dS' the gradient of the state after a chunk, equations (53-72) reduce to

    X = K_tail dS'      dS = gamma_C * dS' + P^T dO - Y^T X                                        (scan)
    dR = A_qk^T dO + X      dZ = A^T dR      dV = w * dZ      dW = v * dZ                          (54, 57, 64, 73-74)
    dA_qk = tril(dO R^T)    dT = -tril(dZ R^T, -1)      (= -tril(A^T dA A^T), since A^T dA A^T = dZ R^T)   (53, 66)
    dQ = gamma * (dO S^T) + ratios of dA_qk with k      dE = -gamma * (dZ S^T) + ratios of dT with k
    dK' = gamma_C/gamma * (R dS'^T) + ratios of dA_qk^T with q and of dT^T with e                  (55-72)
    dG_r = q dQ + e dE - k dK'    dg_i = sum_{r >= i} dG_r + gamma_C rowsum(dS' * S) + sum_r k_r dK_tail_r   (76-82)

where "ratios of M with k" is, per channel, sum_s M_rs gamma_r/gamma_s k_s. The pair r = s carries no decay: it is left
out of dG, where it would cancel, and added to dQ and dK' afterwards. Shapes and constants are those of `forward.py`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

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
def scan_back(
    Y_ptr, P_ptr, K_tail_ptr, gamma_ptr, after_ptr, do_ptr, dS_last_ptr,
    dS_first_ptr, dS_ptr, X_ptr,
    start_ptr, first_chunk_ptr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
    ERASE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One sequence, one value head, BV value channels, last chunk first: X and `after` * dS' of every chunk.

    LAST says whether a gradient of the final state comes in, FIRST whether that of the initial state is wanted.
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

    dS = tl.zeros((KP, BV), tl.float32)
    if LAST:
        dS += tl.load(dS_last_ptr + state, mask=inside, other=0.0)
    for step in tl.range(0, last - first, num_stages=STAGES):
        chunk = last.to(tl.int64) - 1 - step
        key_unit, value_unit = chunk * H + head, chunk * HV + value_head
        token = start + (chunk - first) * C
        P = tl.load(P_ptr + key_unit * C * KP + by_key)
        K_tail = tl.load(K_tail_ptr + key_unit * C * KP + by_key)
        gamma = tl.load(gamma_ptr + key_unit * KP + keys)
        do = token_tile(do_ptr, token, rows, end - token, value_head, HV, V, cols)
        after = tl.load(after_ptr + key_unit * KP + keys)
        tl.store(dS_ptr + value_unit * KP * VP + by_state, (dS * after[:, None]).to(DT))
        dS_low = dS.to(DT)
        X = product(K_tail, dS_low, DT, PREC).to(DT)
        tl.store(X_ptr + value_unit * C * VP + by_value, X)
        dS = dS * gamma[:, None] + product(tl.trans(P), do, DT, PREC)
        if ERASE:
            Y = tl.load(Y_ptr + key_unit * C * KP + by_key)
            dS -= product(tl.trans(Y), X, DT, PREC)
    if FIRST:
        tl.store(dS_first_ptr + state, dS, mask=inside)


@triton.jit
def value_gradients(
    v_ptr, w_ptr, do_ptr, X_ptr, R_ptr, A_ptr, A_qk_ptr,
    dv_ptr, dw_ptr, dA_qk_ptr, dT_ptr,
    token_ptr, length_ptr,
    H: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, DW: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, ERASE: tl.constexpr,
):  # fmt: skip
    """One chunk of the value heads of one key head: dZ in the place of X, dV, dW, and dA_qk and dT summed."""
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    n = tl.load(length_ptr + chunk)
    if n == 0:
        return
    token = tl.load(token_ptr + chunk)
    rows = tl.arange(0, C)
    square = tl.program_id(0).to(tl.int64) * C * C + offsets(rows, rows, C)
    A_qk_T = tl.trans(tl.load(A_qk_ptr + square))
    if ERASE:
        A_T = tl.trans(tl.load(A_ptr + square))
    dA_qk = tl.zeros((C, C), tl.float32)
    dT = tl.zeros((C, C), tl.float32)
    for member in tl.range(0, HV // H):
        value_head = head * (HV // H) + member
        dw_shared = tl.zeros((C,), tl.float32)
        for first in tl.range(0, VP, BV):
            cols = first + tl.arange(0, BV)
            tile = (chunk.to(tl.int64) * HV + value_head) * C * VP + offsets(rows, cols, VP)
            do = token_tile(do_ptr, token, rows, n, value_head, HV, V, cols).to(DT)
            R_T = tl.trans(tl.load(R_ptr + tile))
            dA_qk += product(do, R_T, DT, PREC)
            dZ = product(A_qk_T, do, DT, PREC) + tl.load(X_ptr + tile).to(tl.float32)
            if ERASE:
                dZ = product(A_T, dZ, DT, PREC)
                dT -= product(dZ, R_T, DT, PREC)
            tl.debug_barrier()  # every thread has read its part of X
            tl.store(X_ptr + tile, dZ.to(DT))
            if DW == 0:
                store_token_tile(dv_ptr, dZ, token, rows, n, value_head, HV, V, cols)
            else:
                v = token_tile(v_ptr, token, rows, n, value_head, HV, V, cols)
                w = gate_tile(w_ptr, token, rows, n, value_head, HV, DW, cols, 1.0)
                store_token_tile(dv_ptr, dZ * w, token, rows, n, value_head, HV, V, cols)
                if DW == 1:
                    dw_shared += tl.sum(dZ * v, 1)
                else:
                    store_token_tile(dw_ptr, dZ * v, token, rows, n, value_head, HV, V, cols)
        if DW == 1:
            at = token * HV + value_head + rows * HV
            tl.store(dw_ptr + at, dw_shared.to(dw_ptr.dtype.element_ty), mask=rows < n)
    tl.store(dA_qk_ptr + square, dA_qk.to(DT))
    if ERASE:
        tl.store(dT_ptr + square, dT.to(DT))


@triton.jit
def _pair_gradients(q, e, k, dA_qk, dT, mask, ERASE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr):
    """What the pairs in `mask` give to dq, de and dk, all of rows scaled by their factor of the ratio (68-71)."""
    k = k.to(DT)
    below = tl.where(mask, dA_qk, 0.0)
    dq = product(below, k, DT, PREC)
    dk = product(tl.trans(below), q, DT, PREC)
    de = dq
    if ERASE:
        below = tl.where(mask, dT, 0.0)
        de = product(below, k, DT, PREC)
        dk += product(tl.trans(below), e, DT, PREC)
    return dq, de, dk


@triton.jit
def _strong_pair_gradients(
    q, e, k, dA_qk, dT, g, g_next, rows,
    LOG_C: tl.constexpr, ERASE: tl.constexpr, RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`_pair_gradients` of all pairs r > s of a strong chunk, with their decay ratios."""
    dq = tl.zeros(q.shape, tl.float32)
    de = tl.zeros(q.shape, tl.float32)
    dk = tl.zeros(q.shape, tl.float32)
    level = tl.full((), LOG_C, tl.int32)
    P = tl.cumsum(g, 0)
    while tl.min(P) < -RANGE:
        level -= 1
        P, X = block_sums(g, g_next, rows, level)
        late, early = tl.exp(P), tl.exp(X)
        mask = half_pair(rows, level)
        more_q, more_e, more_k = _pair_gradients(q * late, e * late, k * early, dA_qk, dT, mask, ERASE, DT, PREC)
        dq += more_q * late
        de += more_e * late
        dk += more_k * early
        P = tl.where(level == 0, 0.0, P)
    late, early = tl.exp(P), tl.exp(-P)
    mask = same_block(rows, level)
    more_q, more_e, more_k = _pair_gradients(q * late, e * late, k * early, dA_qk, dT, mask, ERASE, DT, PREC)
    return dq + more_q * late, de + more_e * late, dk + more_k * early


@triton.jit
def _times_state(
    rows_ptr, state_ptr, chunk, head, keys, rows, n, token,
    HV: tl.constexpr, GROUP: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    C: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """rows state^T [C, BK] summed over value channels and the value heads of a key head.

    BY_TOKEN says whether the rows lie in a [tokens, HV, V] tensor or in chunk-major scratch.
    """
    total = tl.zeros((C, keys.shape[0]), tl.float32)
    for part in tl.range(0, GROUP * (VP // BV)):
        value_head = head * GROUP + part // (VP // BV)
        cols = (part % (VP // BV)) * BV + tl.arange(0, BV)
        unit = chunk.to(tl.int64) * HV + value_head
        state = tl.load(state_ptr + unit * KP * VP + offsets(keys, cols, VP))
        if BY_TOKEN:
            left = token_tile(rows_ptr, token, rows, n, value_head, HV, V, cols)
        else:
            left = tl.load(rows_ptr + unit * C * VP + offsets(rows, cols, VP))
        total += product(left, tl.trans(state), DT, PREC)
    return total


@triton.jit
def _state_overlap(
    S_ptr, dS_ptr, chunk, head, keys,
    HV: tl.constexpr, GROUP: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """rowsum(S * dS') [BK] over the value heads of a key head (60)."""
    total = tl.zeros((keys.shape[0],), tl.float32)
    for part in tl.range(0, GROUP * (VP // BV)):
        value_head = head * GROUP + part // (VP // BV)
        cols = (part % (VP // BV)) * BV + tl.arange(0, BV)
        tile = (chunk.to(tl.int64) * HV + value_head) * KP * VP + offsets(keys, cols, VP)
        total += tl.sum(tl.load(S_ptr + tile).to(tl.float32) * tl.load(dS_ptr + tile).to(tl.float32), 1)
    return total


@triton.jit
def key_gradients(
    q_ptr, k_ptr, g_ptr, b_ptr, do_ptr, dZ_ptr, R_ptr, S_ptr, dS_ptr, dA_qk_ptr, dT_ptr,
    dq_ptr, dk_ptr, dg_ptr, db_ptr,
    token_ptr, length_ptr, strong_ptr, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    DG: tl.constexpr, DB: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RANGE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head, summed over its value heads: dq, dk, d log-decay and d erase.

    Like `prepare_chunks` it is launched once for the ordinary and once for the strong chunks. dQ, dE and dK' come one
    after the other, so that few tiles are alive at once.
    """
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    n = tl.load(length_ptr + chunk)
    if n == 0:
        return
    if (tl.load(strong_ptr + tl.program_id(0)) != 0) != STRONG:
        return
    token = tl.load(token_ptr + chunk)
    rows = tl.arange(0, C)
    ERASE: tl.constexpr = DB != 0
    GROUP: tl.constexpr = HV // H
    square = tl.program_id(0).to(tl.int64) * C * C + offsets(rows, rows, C)
    below = rows[:, None] > rows[None, :]
    diagonal = tl.load(dA_qk_ptr + tl.program_id(0).to(tl.int64) * C * C + rows * (C + 1)).to(tl.float32)

    dg_shared = tl.zeros((C,), tl.float32)
    db_shared = tl.zeros((C,), tl.float32)
    for first in tl.range(0, KP, BK):
        keys = first + tl.arange(0, BK)
        g = gate_tile(g_ptr, token, rows, n, head, H, DG, keys, 0.0)
        k = token_tile(k_ptr, token, rows, n, head, H, K, keys)
        if STRONG:
            g_next = gate_tile(g_ptr, token, rows + 1, n, head, H, DG, keys, 0.0)
            late_sum, early_sum = tl.cumsum(g, 0), tl.cumsum(g_next, 0, reverse=True)
        else:
            late_sum, _, _ = from_middle(g, rows, C, RANGE)
            early_sum = -late_sum
            k_early = (k * tl.exp(early_sum)).to(DT)

        q = token_tile(q_ptr, token, rows, n, head, H, K, keys) * scale
        dk = _times_state(R_ptr, dS_ptr, chunk, head, keys, rows, n, token,
                          HV, GROUP, V, KP, VP, C, BV, DT, PREC, False) * tl.exp(early_sum)  # fmt: skip
        # Nothing decays after the last token: left out of dG, where it would cancel to rounding noise.
        decays = rows[:, None] < n - 1
        later = tl.sum(tl.where(decays, k * dk, 0.0), 0)
        dA_qk = tl.load(dA_qk_ptr + square, mask=below, other=0.0)
        e = k
        dT = dA_qk
        if ERASE:
            e = k * gate_tile(b_ptr, token, rows, n, head, H, DB, keys, 0.0)
            dT = tl.load(dT_ptr + square, mask=below, other=0.0)
        if STRONG:
            near_q, near_e, near_k = _strong_pair_gradients(
                q, e, k, dA_qk, dT, g, g_next, rows, LOG_C, ERASE, RANGE, DT, PREC
            )
            dk += near_k
        else:
            near_k = product(tl.trans(dA_qk), q * tl.exp(late_sum), DT, PREC)
            if ERASE:
                near_k += product(tl.trans(dT), e * tl.exp(late_sum), DT, PREC)
            dk += near_k * tl.exp(early_sum)
        dG = tl.where(decays, -k * dk, 0.0)
        dk += diagonal[:, None] * q

        if ERASE:
            de = -_times_state(dZ_ptr, S_ptr, chunk, head, keys, rows, n, token,
                               HV, GROUP, V, KP, VP, C, BV, DT, PREC, False)  # fmt: skip
            if STRONG:
                de = de * tl.exp(late_sum) + near_e
            else:
                dT = tl.load(dT_ptr + square, mask=below, other=0.0)
                de = (de + product(dT, k_early, DT, PREC)) * tl.exp(late_sum)
            b = gate_tile(b_ptr, token, rows, n, head, H, DB, keys, 0.0)
            dk += b * de
            db = k * de
            dG += b * db
            if DB == 1:
                db_shared += tl.sum(db, 1)
            else:
                store_token_tile(db_ptr, db, token, rows, n, head, H, K, keys)
        store_token_tile(dk_ptr, dk, token, rows, n, head, H, K, keys)

        dq = _times_state(do_ptr, S_ptr, chunk, head, keys, rows, n, token,
                          HV, GROUP, V, KP, VP, C, BV, DT, PREC, True)  # fmt: skip
        if STRONG:
            dq = dq * tl.exp(late_sum) + near_q
        else:
            dA_qk = tl.load(dA_qk_ptr + square, mask=below, other=0.0)
            dq = (dq + product(dA_qk, k_early, DT, PREC)) * tl.exp(late_sum)
        dG += token_tile(q_ptr, token, rows, n, head, H, K, keys) * scale * dq
        store_token_tile(dq_ptr, (dq + diagonal[:, None] * k) * scale, token, rows, n, head, H, K, keys)
        if DG != 0:
            decayed = _state_overlap(S_ptr, dS_ptr, chunk, head, keys, HV, GROUP, KP, VP, BV)
            if STRONG:
                decayed *= tl.exp(tl.sum(g, 0))
            dg = tl.cumsum(dG, 0, reverse=True) + (later + decayed)[None, :]
            if DG == 1:
                dg_shared += tl.sum(dg, 1)
            else:
                store_token_tile(dg_ptr, dg, token, rows, n, head, H, K, keys)
    shared = token * H + head + rows * H
    if DG == 1:
        tl.store(dg_ptr + shared, dg_shared.to(dg_ptr.dtype.element_ty), mask=rows < n)
    if DB == 1:
        tl.store(db_ptr + shared, db_shared.to(db_ptr.dtype.element_ty), mask=rows < n)
