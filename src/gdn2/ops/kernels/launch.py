"""Host side of the kernels: where the chunks are, which configuration runs, the buffers, the launches.

Plain functions on tensors, without autograd and without a look at any tensor's values, so nothing waits for the GPU.
Shapes as in `docs/architecture.md`. Every grid lies on axis 0, every base offset is 64-bit.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels.backward import key_gradients, scan_back, value_gradients
from gdn2.ops.kernels.forward import prepare_chunks, scan_chunks
from gdn2.ops.kernels.run import INTERPRET, run
from gdn2.ops.kernels.step import step_token

MAX_HEAD = 256
FEW = 64  # programs of a scan below which it takes narrower tiles, to keep more of the GPU busy


@dataclass(frozen=True)
class Config:
    """Tokens per chunk, and for each kernel its channels per tile (BK, BV), warps and pipeline stages."""

    chunk: int
    prepare: tuple[int, int, int, int]
    strong_prepare: tuple[int, int, int, int]
    scan: tuple[int, int, int]  # BV, warps, stages; `scan_back` too
    narrow_scan: tuple[int, int, int]
    value: tuple[int, int, int]  # BV, warps, stages
    key: tuple[int, int, int, int]
    strong_key: tuple[int, int, int, int]


# By bytes of an operand: (largest padded head size, configuration), first match. Each was run and checked on an H100.
CONFIGS = {
    2: (
        (128, Config(64, (64, 64, 4, 2), (64, 64, 4, 1), (64, 4, 3), (32, 4, 3), (64, 4, 1), (64, 64, 4, 1),
                     (64, 64, 4, 1))),
        (256, Config(32, (64, 64, 4, 1), (64, 64, 4, 1), (64, 4, 2), (64, 4, 2), (64, 4, 1), (64, 64, 4, 1),
                     (64, 64, 4, 1))),
    ),
    4: (
        (128, Config(32, (32, 32, 4, 1), (32, 32, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1), (32, 32, 4, 1),
                     (32, 32, 4, 1))),
        (256, Config(16, (32, 32, 4, 1), (32, 32, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1), (32, 32, 4, 1),
                     (32, 32, 4, 1))),
    ),
}  # fmt: skip
INTERPRETED = Config(
    16, (16, 16, 1, 1), (16, 16, 1, 1), (16, 1, 1), (16, 1, 1), (16, 1, 1), (16, 16, 1, 1), (16, 16, 1, 1)
)


def config_for(dtype: torch.dtype, K: int, V: int) -> Config:
    """The configuration for tensors of this dtype and head sizes. ValueError when the kernels have none."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"the Triton kernels take bfloat16, float16 or float32 tensors, not {dtype}")
    if not 1 <= min(K, V) <= max(K, V) <= MAX_HEAD:
        raise ValueError(f"the Triton kernels take head sizes from 1 to {MAX_HEAD}, not K = {K}, V = {V}")
    if INTERPRET:
        return INTERPRETED
    return next(config for bound, config in CONFIGS[4 if dtype == torch.float32 else 2] if max(K, V) <= bound)


class Shape(NamedTuple):
    """Compile-time sizes and types shared by the kernels, named as there, and the dtype of the scratch buffers."""

    H: int
    HV: int
    K: int
    V: int
    KP: int
    VP: int
    C: int
    LOG_C: int
    DT: tl.dtype
    PREC: str
    SOLVE: str
    RANGE: float
    buffer: torch.dtype


@lru_cache(maxsize=64)
def _shape(dtype: torch.dtype, H: int, K: int, HV: int, V: int) -> tuple[Config, Shape]:
    config = config_for(dtype, K, V)
    # Operands are bfloat16 for float16 tensors too: decay factors and gradients need its range. float32 tensors take a
    # smaller RANGE, since the rounding error of a sum of log-decays grows with it.
    exact = dtype == torch.float32
    DT, buffer = (tl.float32, torch.float32) if exact or INTERPRET else (tl.bfloat16, torch.bfloat16)
    PREC = "ieee" if INTERPRET else "tf32x3"
    # The inverse of a chunk with bfloat16 operands is rounded to bfloat16 at once, so tf32 products cost it nothing.
    SOLVE = "tf32" if DT is tl.bfloat16 else PREC
    # bfloat16 tiles narrower than 64 gave wrong products on Hopper with Triton 3.6.
    least = 64 if DT is tl.bfloat16 else 16
    KP, VP = (max(least, triton.next_power_of_2(size)) for size in (K, V))
    LOG_C = config.chunk.bit_length() - 1
    return config, Shape(H, HV, K, V, KP, VP, config.chunk, LOG_C, DT, PREC, SOLVE, 20.0 if exact else 70.0, buffer)


class Activation(NamedTuple):
    """That the operands are a layer's projections, and how they become q, k and gates: see `inputs.py`."""

    rate: Tensor | None  # [H] float32, None without decay
    delta: Tensor | None  # [H * K], or [H] for a decay shared by the channels; float32
    largest_erase: float
    largest_write: float


L2_EPS = 1e-6
GIVEN = Activation(None, None, 1.0, 1.0)


class Chunks(NamedTuple):
    """Where the chunks are. There are at most M of them; one that does not exist has length 0."""

    token: Tensor  # [M] int64, first token
    length: Tensor  # [M] int32, tokens in it
    start: Tensor  # [N + 1] int64, first token of each sequence, and the total
    first: Tensor  # [N + 1] int32, first chunk of each sequence, and the total


def _locate(start: Tensor, M: int, C: int) -> Chunks:
    counts = (start.diff() + (C - 1)) // C
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    chunk = torch.arange(M, device=start.device)
    sequence = torch.searchsorted(first[1:], chunk, right=True).clamp(max=len(counts) - 1)
    token = start[sequence] + (chunk - first[sequence]) * C
    length = (start[sequence + 1] - token).clamp(min=0, max=C)
    return Chunks(token, length.to(torch.int32), start, first.to(torch.int32))


@lru_cache(maxsize=32)
def _equal_chunks(B: int, T: int, C: int, device: torch.device) -> Chunks:
    # Made on the CPU: the copy is complete when it returns, so that any stream may read it, and outside inference mode
    # for the sake of a later training step.
    with torch.inference_mode(False):
        chunks = _locate(torch.arange(B + 1) * T, B * -(-T // C), C)
        return Chunks(*(x.to(device) for x in chunks))


def chunk_count(k: Tensor, cu_seqlens: Tensor | None, C: int) -> int:
    """M, known without a look at cu_seqlens: each packed sequence adds at most one short chunk."""
    B, T = k.shape[:2]
    return B * -(-T // C) if cu_seqlens is None else T // C + len(cu_seqlens) - 1


def locate_chunks(k: Tensor, cu_seqlens: Tensor | None, C: int) -> Chunks:
    """The chunks of k [B, T, ...]."""
    B, T = k.shape[:2]
    if cu_seqlens is None:
        return _equal_chunks(B, T, C, k.device)
    return _locate(cu_seqlens.to(device=k.device, dtype=torch.int64), chunk_count(k, cu_seqlens, C), C)


class Residuals(NamedTuple):
    """What the backward reads, by chunk and head; Y and A are empty without erasing."""

    S: Tensor
    R: Tensor
    P: Tensor
    K_tail: Tensor
    gamma: Tensor
    after: Tensor
    A_qk: Tensor
    strong: Tensor
    Y: Tensor
    A: Tensor


USED_BY_SCAN = ("P", "K_tail", "gamma", "strong", "Y")


def residual_specs(
    k: Tensor, v: Tensor, erase: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of `Residuals`."""
    _, s = _shape(v.dtype, *(int(size) for size in (*k.shape[2:], *v.shape[2:])))  # symbolic ones become constants
    M = chunk_count(k, cu_seqlens, s.C)
    by_key, square, vector = (M, s.H, s.C, s.KP), (M, s.H, s.C, s.C), (M, s.H, s.KP)
    return [
        ((M, s.HV, s.KP, s.VP), s.buffer),
        ((M, s.HV, s.C, s.VP), s.buffer),
        (by_key, s.buffer),
        (by_key, s.buffer),
        (vector, torch.float32),
        (vector, torch.float32),
        (square, s.buffer),
        ((M, s.H), torch.int8),
        ((0,) if erase is None else by_key, s.buffer),
        ((0,) if erase is None else square, s.buffer),
    ]


def _last(gate: Tensor | None) -> int:
    return 0 if gate is None else gate.shape[-1]


def _dense(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def _launches(log_decay: Tensor | None) -> tuple[bool, ...]:
    """The values of STRONG to launch with: without decay no chunk is strong."""
    return (False,) if log_decay is None else (False, True)


def _scan_tile(config: Config, N: int, s: Shape) -> tuple[int, int, int]:
    """BV, warps and stages of a scan over N sequences."""
    programs = N * s.HV * s.VP // config.scan[0]
    BV, warps, stages = config.scan if programs >= FEW else config.narrow_scan
    return min(s.VP, BV), warps, stages


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None,
    scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    output_final_state: bool, save_for_backward: bool, activation: Activation | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:  # fmt: skip
    """o in v's dtype, the final state (None unless wanted), and `Residuals` for `backward` (empty unless saved).

    The dtypes of q, k, v, erase and write are bfloat16, float16 or float32; log_decay is best in float32. With an
    `activation` they are what the layer projects.
    ValueError for other dtypes and for head sizes above `MAX_HEAD`.
    """
    config, s = _shape(v.dtype, *k.shape[2:], *v.shape[2:])
    a = activation or GIVEN
    chunks = locate_chunks(k, cu_seqlens, s.C)
    M, N = len(chunks.token), len(chunks.first) - 1
    q, k, v, log_decay, erase, write, initial_state = _dense(q, k, v, log_decay, erase, write, initial_state)
    specs = zip(Residuals._fields, residual_specs(k, v, erase, cu_seqlens))
    kept = Residuals(
        **{
            name: torch.empty(shape if save_for_backward or name in USED_BY_SCAN else 0, dtype=dtype, device=v.device)
            for name, (shape, dtype) in specs
        }
    )
    before = torch.empty_like(kept.gamma)
    O_local = torch.empty(M, s.HV, s.C, s.VP, dtype=s.buffer, device=v.device)
    U = kept.R if erase is None and save_for_backward else torch.empty_like(O_local)

    for strong in _launches(log_decay):
        BK, BV, warps, stages = config.strong_prepare if strong else config.prepare
        run(
            prepare_chunks, M * s.H,
            (q, k, v, log_decay, erase, write, a.rate, a.delta, kept.Y, kept.P, kept.K_tail, kept.gamma, before,
             kept.after, U, O_local, kept.A, kept.A_qk, chunks.token, chunks.length, kept.strong, scale,
             a.largest_erase, a.largest_write, L2_EPS),
            (s.H, s.HV, s.K, s.V, s.KP, s.VP, _last(log_decay), _last(erase), _last(write), s.C, s.LOG_C,
             min(s.KP, BK), min(s.VP, BV), s.RANGE, s.DT, s.PREC, s.SOLVE, save_for_backward, activation is not None,
             strong),
            warps, stages,
        )  # fmt: skip
    o = torch.empty_like(v)
    final = torch.empty(N, s.HV, s.K, s.V, device=v.device) if output_final_state else None
    BV, warps, stages = _scan_tile(config, N, s)
    run(
        scan_chunks, N * s.HV * (s.VP // BV),
        (kept.Y, kept.P, kept.K_tail, kept.gamma, before, U, O_local, initial_state, o, final, kept.S, kept.R,
         chunks.start, chunks.first),
        (s.H, s.HV, s.K, s.V, s.KP, s.VP, s.C, BV, stages, s.DT, s.PREC, erase is not None,
         initial_state is not None, output_final_state, save_for_backward),
        warps, stages,
    )  # fmt: skip
    return o, final, kept if save_for_backward else ()


def backward(
    do: Tensor, dfinal_state: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None,
    scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None, residuals: tuple[Tensor, ...],
    activation: Activation | None = None, o: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, log_decay, erase, write and initial_state, each of its input's shape and dtype or None.

    With an `activation`, which takes the forward's o, those of its rate and delta follow.
    """
    config, s = _shape(v.dtype, *k.shape[2:], *v.shape[2:])
    a, act = activation or GIVEN, activation is not None
    kept = Residuals(*residuals)
    chunks = locate_chunks(k, cu_seqlens, s.C)
    M, N = len(chunks.token), len(chunks.first) - 1
    do, dfinal_state, q, k, v, log_decay, erase, write = _dense(do, dfinal_state, q, k, v, log_decay, erase, write)
    dS, X, dA_qk, minus_dT = (torch.empty_like(x) for x in (kept.S, kept.R, kept.A_qk, kept.A))
    dq, dk, dv, dg, db, dw, dS_first = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, erase, write, initial_state)
    )
    diagonal = torch.empty(M, s.H, s.C, device=v.device)
    # Key channels of a program: all of them where a gate that they share takes the sum of their gradients.
    span = s.KP if 1 in (_last(log_decay), _last(erase)) else min(s.KP, config.key[0])
    along_q, along_k = torch.empty(2, M, s.H, s.C, device=v.device) if act else (None, None)
    # Chunks that do not exist add nothing.
    drate = torch.zeros(M, s.H, s.KP // span, device=v.device) if a.rate is not None else None
    ddelta = torch.zeros(M, len(a.delta), device=v.device) if a.delta is not None else None

    BV, warps, stages = _scan_tile(config, N, s)
    run(
        scan_back, N * s.HV * (s.VP // BV),
        (kept.Y, kept.P, kept.K_tail, kept.gamma, kept.after, do, dfinal_state, dS_first, dS, X,
         chunks.start, chunks.first),
        (s.H, s.HV, s.K, s.V, s.KP, s.VP, s.C, BV, stages, s.DT, s.PREC, erase is not None,
         initial_state is not None, dfinal_state is not None),
        warps, stages,
    )  # fmt: skip
    BV, warps, stages = config.value
    run(
        value_gradients, M * s.H,
        (v, write, o, do, X, kept.R, kept.A, kept.A_qk, dv, dw, dA_qk, diagonal,
         minus_dT, along_q, along_k, chunks.token, chunks.length, a.largest_write),
        (s.H, s.HV, s.V, s.VP, _last(write), s.C, min(s.VP, BV), s.DT, s.PREC, erase is not None, act),
        warps, stages,
    )  # fmt: skip
    for strong in _launches(log_decay):
        BK, BV, warps, stages = config.strong_key if strong else config.key
        run(
            key_gradients, M * s.H * (s.KP // span),
            (q, k, log_decay, erase, a.rate, a.delta, do, X, kept.R, kept.S, dS, dA_qk, diagonal, minus_dT, along_q,
             along_k, dq, dk, dg, db, drate, ddelta, chunks.token, chunks.length, kept.strong, scale, a.largest_erase,
             L2_EPS),
            (s.H, s.HV, s.K, s.V, s.KP, s.VP, _last(log_decay), _last(erase), s.C, s.LOG_C,
             span, min(span, BK), min(s.VP, BV), s.RANGE, s.DT, s.PREC, act, strong),
            warps, stages,
        )  # fmt: skip
    gradients = dq, dk, dv, dg, db, dw, dS_first
    if not act:
        return gradients
    drate = None if drate is None or a.rate is None else drate.sum((0, 2)).to(a.rate.dtype)
    return *gradients, drate, None if ddelta is None or a.delta is None else ddelta.sum(0).to(a.delta.dtype)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None,
    scale: float, state: Tensor, slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One token: q, k, log_decay, erase [N, H, K or 1], v, write [N, HV, V or 1] -> o [N, HV, V].

    `state` [N, HV, K, V] float32 is updated in place; with `slots` [N] it is a pool [rows, HV, K, V] and sequence n
    lives in row slots[n]. Allocates nothing but o, so that a CUDA graph can capture it. ValueError as `forward`, and
    for a state that is not contiguous float32.
    """
    (N, H, K), (HV, V) = k.shape, v.shape[1:]
    _, s = _shape(v.dtype, H, K, HV, V)
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"state is {state.dtype} with strides {state.stride()}; expected contiguous float32")
    q, k, v, log_decay, erase, write = _dense(q, k, v, log_decay, erase, write)
    o = torch.empty_like(v)
    BV = min(16 if INTERPRET else 32, s.VP)
    run(
        step_token, N * HV * triton.cdiv(V, BV),
        (q, k, v, log_decay, erase, write, state, slots, o, scale),
        (H, HV, K, V, triton.next_power_of_2(K), BV, _last(log_decay), _last(erase), _last(write), slots is not None),
        4, 1,
    )  # fmt: skip
    return o
