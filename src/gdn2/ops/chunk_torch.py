"""The chunkwise form (18-25) and its gate-aware backward (53-82) in plain PyTorch: readable, exact, fast on a CPU.

It is also the specification of the GPU kernels. Capitals are the paper's, for one chunk of C tokens of one key head:

    E, Z  erase direction b * k and content w * v                                                  (8)
    T     strictly lower, T_rs = e_r . (gamma_r / gamma_s) k_s;   A = (I + T)^-1                    (21)
    A_qk  lower, q_r . (gamma_r / gamma_s) k_s                                                      (25)
    Ebar, Q_gamma   gamma * e, gamma * q;   K_tail = (gamma_C / gamma) * k                          (20, 23, 24)
    Y, U  A Ebar, A Z;   R = U - Y S, what the chunk binds to its keys                              (22, 35)
    S     the state [K, V] at the chunk's start

`blocks.py` says how the ratios of gamma are formed. Chunks are prepared all at once; only S is handed from step to step
(`layout.py`). Grouped value heads of one key head share T, A, A_qk and Y, so they are laid side by side as one head of
G * V value channels: that is the V of this file. The backward reads A, A_qk and S of each chunk from the forward and
recomputes what is elementwise.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn2.ops.blocks import levels, like, scores, sweep_backward
from gdn2.ops.layout import ChunkLayout

# Tokens x heads that are worked on at a time, so that intermediates stay in cache and memory does not grow with T.
SEGMENT = 1 << 14


@dataclass
class Inputs:
    """The operator's arguments in their public layout; a gate of one channel is shared by its head's channels."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    erase: Tensor | None
    write: Tensor | None
    scale: float

    def __post_init__(self) -> None:
        for name, x in self.tensors().items():  # once here, or every segment would copy all of a strided tensor
            shared = x.shape[-1] > 1 and x.stride(-1) == 0
            setattr(self, name, x[..., :1].contiguous().expand(x.shape) if shared else x.contiguous())
        self.dtype = torch.promote_types(self.v.dtype, torch.float32)
        self.H = self.k.shape[2]
        self.G = self.v.shape[2] // self.H

    def tensors(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v}
        gates = {"log_decay": self.log_decay, "erase": self.erase, "write": self.write}
        return named | {name: gate for name, gate in gates.items() if gate is not None}

    def by_head(self) -> dict[str, Tensor]:
        """`tensors` with value heads beside their key head: v and write as [B, T, H, G, ...]."""
        return {n: t.unflatten(2, (self.H, self.G)) if n in ("v", "write") else t for n, t in self.tensors().items()}


class Chunk:
    """The chunks of one segment, inputs cut and gates applied. Tensors are [n, C, ...], n chunks x key heads."""

    def __init__(self, x: Inputs, layout: ChunkLayout, begin: int, end: int) -> None:
        cut = {name: layout.cut(t, begin, end).flatten(0, 1).to(x.dtype) for name, t in x.by_head().items()}
        self.q, self.k, self.v = cut["q"] * x.scale, cut["k"], cut["v"]
        self.b, self.w = cut.get("erase"), cut.get("write")
        self.e = self.b * self.k if self.b is not None else None
        self.Z = (self.v if self.w is None else self.w * self.v).flatten(-2)
        g = cut.get("log_decay")
        self.g = self.k.new_zeros(*self.k.shape[:-1], 1) if g is None else g


@dataclass
class Saved:
    """What the forward leaves for the backward: S [n, K, V], A and A_qk [n, C, C] of all n chunks x key heads.

    A is empty without an erase gate.
    """

    S: Tensor
    A: Tensor
    A_qk: Tensor


def forward(x: Inputs, initial_state: Tensor | None, layout: ChunkLayout, saved: Saved | None) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] and the final state [N, HV, K, V]; fills `saved` when given."""
    state = _stack_heads(initial_state, x, layout)
    V = state.shape[-1]
    o = state.new_empty(layout.M * x.H, layout.C, V)
    for steps, begin, end in layout.segments(SEGMENT):
        rows = slice(begin * x.H, end * x.H)
        c = Chunk(x, layout, begin, end)
        sweep, A_qk, A = scores(c.q, c.k, c.e, c.g)
        Y, R = None, c.Z
        if A is not None and sweep.E is not None:
            Y, R = A @ sweep.E, A @ c.Z  # Y, and U until the scan reaches it (22)
        gamma_C = sweep.total.mT
        S = state.new_empty(len(R), *state.shape[2:])
        for here, now in _scan(state, steps, x.H):
            S[here] = now
            if Y is not None:
                R[here].baddbmm_(Y[here], now, alpha=-1)  # (35)
            now *= gamma_C[here]
            now.baddbmm_(sweep.K[here].mT, R[here])  # (23)
        out = torch.bmm(sweep.Q, S, out=o[rows])
        out.baddbmm_(A_qk, R)  # (24)
        if saved is not None:
            saved.S[rows], saved.A_qk[rows] = S, A_qk
            if A is not None:
                saved.A[rows] = A
    return layout.join(o.unflatten(-1, (x.G, -1)), x.v.shape, x.v.dtype), _unstack_heads(state, x, layout)


def _scan(state: Tensor, steps: list[int], H: int, reverse: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """For each step of a segment: its rows among the segment's chunks x heads, and the states they act on, a view."""
    ends = list(itertools.accumulate(steps))
    order = range(len(steps))
    for j in reversed(order) if reverse else order:
        yield slice((ends[j] - steps[j]) * H, ends[j] * H), state[: steps[j]].flatten(0, 1)


def _stack_heads(state: Tensor | None, x: Inputs, layout: ChunkLayout) -> Tensor:
    """[N, HV, K, V] -> [N, H, K, G * V], sequences in the layout's order; zeros for None."""
    K, V = x.k.shape[-1], x.v.shape[-1]
    if state is None:
        return torch.zeros(len(layout.order), x.H, K, x.G * V, dtype=x.dtype, device=x.k.device)
    return state.to(x.dtype).unflatten(1, (x.H, x.G)).transpose(2, 3).flatten(-2)[layout.order]


def _unstack_heads(state: Tensor, x: Inputs, layout: ChunkLayout) -> Tensor:
    out = torch.empty_like(state)
    out[layout.order] = state
    return out.unflatten(-1, (x.G, -1)).transpose(2, 3).flatten(1, 2).contiguous()


def backward(
    do: Tensor, d_final: Tensor, x: Inputs, layout: ChunkLayout, saved: Saved
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the tensors in `x`, by name, and of the initial state [N, HV, K, V].

    Upstream are do [B, T, HV, V] and d_final [N, HV, K, V]. Equation numbers stand beside the lines.

    Two of the paper's steps are shortened: with dZ = A^T dU and dEbar = A^T dY, (64) and (66) together are
    dT = -tril(dZ U^T + dEbar Y^T, -1); and (66-71, 76-82) never divide by gamma (`blocks.sweep_backward`).
    """
    dS = _stack_heads(d_final, x, layout)
    out = {name: dS.new_empty(layout.M * x.H, layout.C, *t.shape[3:]) for name, t in x.by_head().items()}
    for steps, begin, end in reversed(layout.segments(SEGMENT)):
        rows = slice(begin * x.H, end * x.H)
        S, A_qk = saved.S[rows], saved.A_qk[rows]
        A = saved.A[rows] if x.erase is not None else None
        c = Chunk(x, layout, begin, end)
        sweep, kept = levels(c.q, c.k, c.e, c.g)
        gamma_C = sweep.total.mT
        dO = layout.cut(do.unflatten(2, (x.H, x.G)), begin, end).flatten(0, 1).flatten(-2).to(x.dtype)
        Y, U = None, c.Z
        if A is not None and sweep.E is not None:
            Y, U = A @ sweep.E, A @ c.Z  # (22)
        R = U if Y is None else torch.baddbmm(U, Y, S, alpha=-1)  # (35)

        dR = A_qk.mT @ dO  # (54)
        from_queries = sweep.Q.mT @ dO  # (56)
        dS_C = torch.empty_like(S)
        for here, now in _scan(dS, steps, x.H, reverse=True):
            dS_C[here] = now
            dR[here].baddbmm_(sweep.K[here], now)  # (57)
            now *= gamma_C[here]  # (59)
            now += from_queries[here]
            if Y is not None:
                now.baddbmm_(Y[here].mT, dR[here], alpha=-1)  # (63)

        dA_qk = dO @ R.mT  # (53)
        dQ_gamma = dO @ S.mT  # (55)
        dK_tail = R @ dS_C.mT  # (58)
        d_log_gamma_C = (dS_C * S).sum(-1).unsqueeze(1) * sweep.total  # (60)
        dZ, dEbar, dT = dR, None, None
        if A is not None and Y is not None:
            dZ = A.mT @ dR  # (61, 65)
            dEbar = torch.bmm(A.mT, dR @ S.mT).neg_()  # (62, 65)
            dT = torch.bmm(dZ, U.mT).baddbmm_(dEbar, Y.mT).neg_()  # (64, 66)
        de, dq, dk, dg = sweep_backward(
            dEbar, dQ_gamma, dK_tail, like(d_log_gamma_C, c.g), dA_qk, dT, c.q, c.k, c.e, c.g, kept
        )
        if de is not None and c.b is not None:
            out["erase"][rows] = like(de * c.k, c.b)  # (75)
            dk.addcmul_(de, c.b)
        dz = dZ.unflatten(-1, (x.G, -1))
        if c.w is not None:
            out["write"][rows] = like(dz * c.v, c.w)  # (73)
            dz = dz * c.w  # (74)
        out["v"][rows], out["k"][rows], out["q"][rows] = dz, dk, dq * x.scale
        if x.log_decay is not None:
            out["log_decay"][rows] = dg
    joined = {name: layout.join(out[name], t.shape, t.dtype) for name, t in x.tensors().items()}
    return joined, _unstack_heads(dS, x, layout)
