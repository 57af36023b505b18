"""Inside one chunk: decays, the score matrices, the inverse of I + T, and their gradients, block by block.

**Decay without overflow or cancellation.** Only the ratios gamma_r / gamma_s = alpha_{s+1} ... alpha_r with r >= s and
alpha = exp(g) <= 1 ever occur. Cut the chunk into aligned blocks of h tokens, h = 1, 2, 4 ... C, and keep for each h

    E_h, Q_h   e and q times the decays from the start of their block up to and including their own token
    K_h        k times the decays behind its token up to the end of its block
    total_h    the product of all decays of a block

For r in the later and s in the earlier half of a block of 2h, e_r . (gamma_r / gamma_s) k_s = E_h[r] . K_h[s]: one
matrix product per level gives all such pairs. Going from h to 2h multiplies later halves of E and Q by their
neighbour's total, earlier halves of K by theirs; at h = C they have become Ebar, Q_gamma and K_tail. Only products of
numbers <= 1 are formed, never a difference or a quotient of cumulative decays, so any decay, -inf included, is exact to
rounding. The gradient walks the same levels back down, for log-decay as sums of (value * gradient) over exactly the
tokens a decay acts on. The inverse is built over the same blocks, A_21 = -A_22 T_21 A_11, as stable as substitution.

Tensors are [n, C, D] for n chunks; D = K, or 1 where a gate is shared by a head's channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def early(x: Tensor, h: int) -> Tensor:
    """The earlier halves of each block of 2h rows of x [n, C, D]: a view [n * C / 2h, h, D]."""
    return x.view(-1, 2, h, x.shape[-1])[:, 0]


def late(x: Tensor, h: int) -> Tensor:
    """The later halves of each block of 2h rows of x [n, C, D]: a view [n * C / 2h, h, D]."""
    return x.view(-1, 2, h, x.shape[-1])[:, 1]


def tiles(x: Tensor, h: int, row: int, col: int) -> Tensor:
    """Of each diagonal block of 2h in x [n, C, C], the tile whose rows are its half `row` and columns its half `col`.

    A view [n, C / 2h, h, h]; (1, 0) is the tile below the diagonal, (0, 0) and (1, 1) those on it.
    """
    n, C = x.shape[0], x.shape[1]
    grid = x.view(n, C // (2 * h), 2, h, C // (2 * h), 2, h)[:, :, row, :, :, col]
    return grid.diagonal(dim1=1, dim2=3).movedim(-1, 1)


@dataclass
class Level:
    """What the level of h works on: later halves of E and Q, earlier halves of K, each [n * C / 2h, h, K].

    `first` and `second` [n * C / 2h, 1, D] are the totals of the blocks' earlier and later halves.
    """

    h: int
    E: Tensor | None
    Q: Tensor
    K: Tensor
    first: Tensor
    second: Tensor


class Sweep:
    """E_h, Q_h, K_h and total_h of chunks q, k, e [n, C, K] and g [n, C, D], for growing h.

    After `climb` they are Ebar, Q_gamma and K_tail [n, C, K] and gamma_C [n, 1, D]; E is None without e.
    """

    def __init__(self, q: Tensor, k: Tensor, e: Tensor | None, g: Tensor) -> None:
        self.total = g.exp()
        self.E = self.total * e if e is not None else None
        self.Q, self.K = self.total * q, k.clone()
        self.n, self.C = k.shape[:2]

    def climb(self) -> Iterator[Level]:
        """Yield each level, views that hold until the next one is asked for."""
        h = 1
        while h < self.C:
            total = self.total.view(-1, 2, self.total.shape[-1])
            E = late(self.E, h) if self.E is not None else None
            level = Level(h, E, late(self.Q, h), early(self.K, h), total[:, :1], total[:, 1:])
            yield level
            if E is not None:
                E *= level.first
            level.Q *= level.first
            level.K *= level.second
            self.total = level.first * level.second
            h *= 2
        self.total = self.total.view(self.n, 1, -1)


def scores(q: Tensor, k: Tensor, e: Tensor | None, g: Tensor) -> tuple[Sweep, Tensor, Tensor | None]:
    """The finished sweep, A_qk (25) and A (21; None without e), each [n, C, C]."""
    n, C, _ = k.shape
    sweep = Sweep(q, k, e, g)
    A_qk = torch.diag_embed((q * k).sum(-1))
    A = torch.eye(C, dtype=k.dtype, device=k.device).repeat(n, 1, 1) if e is not None else None
    for level in sweep.climb():
        h = level.h
        tiles(A_qk, h, 1, 0).copy_((level.Q @ level.K.mT).view(n, -1, h, h))
        if A is not None and level.E is not None:
            T_21 = (level.E @ level.K.mT).view(n, -1, h, h)
            tiles(A, h, 1, 0).copy_(-(tiles(A, h, 1, 1) @ (T_21 @ tiles(A, h, 0, 0))))
    return sweep, A_qk, A


def levels(q: Tensor, k: Tensor, e: Tensor | None, g: Tensor) -> tuple[Sweep, list[Level]]:
    """The finished sweep and a copy of each of its levels, for `sweep_backward`."""
    sweep = Sweep(q, k, e, g)
    kept = []
    for level in sweep.climb():
        E = level.E.clone() if level.E is not None else None
        kept.append(replace(level, E=E, Q=level.Q.clone(), K=level.K.clone()))
    return sweep, kept


def sweep_backward(
    dE: Tensor | None, dQ: Tensor, dK: Tensor, d_log_total: Tensor, dA_qk: Tensor, dT: Tensor | None,
    q: Tensor, k: Tensor, e: Tensor | None, g: Tensor, kept: list[Level],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of e, q, k [n, C, K] and g [n, C, D] (66-71, 76-82), given those of the sweep's and scores' results.

    dE, dQ, dK [n, C, K] are those of Ebar, Q_gamma and K_tail, and are used up; d_log_total [n, 1, D] is that of
    log gamma_C. dA_qk and dT [n, C, C] are read below the diagonal, dA_qk also on it. `kept` comes from `levels`.
    """
    for level in reversed(kept):
        h, first, second = level.h, level.first, level.second
        dQ_late, dK_early = late(dQ, h), early(dK, h)
        by_first, by_second = dQ_late * level.Q, dK_early * level.K
        dQ_late *= first
        dK_early *= second
        tile = tiles(dA_qk, h, 1, 0).reshape(-1, h, h)
        dQ_late += tile @ level.K
        dK_early += tile.mT @ level.Q
        if dE is not None and dT is not None and level.E is not None:
            dE_late = late(dE, h)
            by_first.addcmul_(dE_late, level.E)
            dE_late *= first
            tile = tiles(dT, h, 1, 0).reshape(-1, h, h)
            dE_late += tile @ level.K
            dK_early += tile.mT @ level.E
        d_first = like(by_first.sum(1, keepdim=True), first) * first
        d_second = like(by_second.sum(1, keepdim=True), second) * second
        d_log_total = (d_log_total + torch.cat((d_first, d_second), dim=1)).view(-1, 1, g.shape[-1])
    alpha = g.exp()
    dg = d_log_total.view_as(g)
    de = dE * alpha if dE is not None else None
    if de is not None and e is not None:
        dg += like(de * e, g)
    diagonal = dA_qk.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    dq = dQ * alpha
    dg += like(dq * q, g)
    dq.addcmul_(diagonal, k)
    dK.addcmul_(diagonal, q)
    return de, dq, dK, dg


def like(x: Tensor, gate: Tensor) -> Tensor:
    """x, summed over its last axis where `gate` holds one number for all of it."""
    return x if gate.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)
