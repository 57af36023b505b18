"""Host side of the kernels: the buffers, the launches.

Plain functions on tensors, without autograd and without a look at any tensor's values, so nothing waits for the GPU.
Shapes as in `docs/architecture.md`. Every grid lies on axis 0, every base offset is 64-bit.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gdn2.ops.kernels.backward import key_gradients, scan_back, value_gradients
from gdn2.ops.kernels.chunks import Segments, chunk_count, locate, segment_count, sequence_count
from gdn2.ops.kernels.configs import Config, Shape, descriptors, plan, scan_tile, segment_length
from gdn2.ops.kernels.forward import prepare_chunks, scan_chunks
from gdn2.ops.kernels.run import INTERPRET, run
from gdn2.ops.kernels.segments import fold_segments, map_segments, map_segments_back
from gdn2.ops.kernels.step import step_token
from gdn2.ops.projected import L2_EPS


class Activation(NamedTuple):
    """That the operands are a layer's projections, and how they become q, k and gates: see `inputs.py`."""

    rate: Tensor | None  # [H] float32, None without decay
    delta: Tensor | None  # [H * K], or [H] for a decay shared by the channels; float32
    largest_erase: float
    largest_write: float


GIVEN = Activation(None, None, 1.0, 1.0)


class Residuals(NamedTuple):
    """What the backward reads, by chunk and head, M by segment; E and A empty without erasing, M without segments."""

    S: Tensor
    X: Tensor
    Q: Tensor
    K_out: Tensor
    gamma: Tensor
    after: Tensor
    A_out: Tensor
    strong: Tensor
    E: Tensor
    A: Tensor
    M: Tensor


USED_BY_SCAN = ("Q", "K_out", "gamma", "A_out", "strong", "E", "M")


def residual_specs(
    k: Tensor, v: Tensor, erase: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of `Residuals`."""
    sizes = (int(size) for size in (*k.shape[2:], *v.shape[2:]))  # symbolic ones become constants
    config, s = plan(v.dtype, v.device, *sizes)
    M, N = chunk_count(k, cu_seqlens, s.C), sequence_count(k, cu_seqlens)
    S = segment_count(M, N, segment_length(config, M, N, s))
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
        ((S, s.H, s.K, s.K) if S else (0,), torch.float32),
    ]


def _last(gate: Tensor | None) -> int:
    return 0 if gate is None else gate.shape[-1]


def _dense(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def _tiles(x: Tensor | None, rows: int, channels: int) -> Any:
    """A token tensor [B, T, heads, D] for `token_tile`: a descriptor where tiles of so many channels make up a head.

    A head that is no power of two is read up to the next one, where a descriptor would give the next head's channels.
    """
    if x is None or x.shape[-1] % channels or x.shape[-1] & (x.shape[-1] - 1):
        return x
    return _descriptor(x, x.shape[2] * x.shape[3], rows, channels)


def _descriptor(x: Tensor, width: int, rows: int, channels: int) -> Any:
    """Tiles [rows, channels] of x as a matrix of this width; x itself where the GPU has no use for a descriptor."""
    if x.numel() == 0 or x.data_ptr() % 16 or not descriptors(x.device):
        return x
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], [rows, channels])


def _launches(log_decay: Tensor | None) -> tuple[bool, ...]:
    """The values of STRONG to launch with: without decay no chunk is strong."""
    return (False,) if log_decay is None else (False, True)


def _before_segments(
    kept: Residuals,
    initial_state: Tensor | None,
    segments: Segments,
    config: Config,
    s: Shape,
    erase: bool,
) -> Tensor:
    """The state before each segment [S, HV, K, V] float32; fills kept.M."""
    S = len(segments.spans.start) - 1
    N = kept.M.new_empty(S, s.HV, s.K, s.V)
    before = torch.empty_like(N)
    BV, warps, stages = config.scan
    for out, HV, D, DP, linear in ((kept.M, s.H, s.K, s.KP, True), (N, s.HV, s.V, s.VP, False)):
        run(
            map_segments, S * HV * (DP // min(DP, BV)),
            (kept.E, kept.K_out, kept.gamma, kept.X, out, segments.spans.first),
            (s.H, HV, D, s.K, s.KP, DP, s.C, min(DP, BV), stages, s.DT, s.PREC, erase, linear),
            warps, stages,
        )  # fmt: skip
    _fold(kept.M, N, initial_state, before, segments, s, back=False)
    return before


def _after_segments(
    kept: Residuals,
    do: Tensor,
    dfinal_state: Tensor | None,
    segments: Segments,
    config: Config,
    s: Shape,
    erase: bool,
) -> Tensor:
    """The gradient of the state after each segment [S, HV, K, V] float32."""
    S = len(segments.spans.start) - 1
    N = do.new_empty(S, s.HV, s.K, s.V, dtype=torch.float32)
    after = torch.empty_like(N)
    BV, warps, stages = min(s.VP, config.scan[0]), *config.scan[1:]
    run(
        map_segments_back, S * s.HV * (s.VP // BV),
        (kept.E, kept.Q, kept.K_out, kept.gamma, kept.A_out, do, N, *segments.spans),
        (s.H, s.HV, s.K, s.V, s.KP, s.VP, s.C, BV, stages, s.DT, s.PREC, erase),
        warps, stages,
    )  # fmt: skip
    _fold(kept.M, N, dfinal_state, after, segments, s, back=True)
    return after


def _fold(M: Tensor, N: Tensor, first: Tensor | None, out: Tensor, segments: Segments, s: Shape, back: bool) -> None:
    BV = min(16 if INTERPRET else 32, triton.next_power_of_2(max(16, s.V)))
    run(
        fold_segments, (len(segments.of) - 1) * s.HV * triton.cdiv(s.V, BV),
        (M, N, first, out, segments.of),
        (s.H, s.HV, s.K, s.V, s.KP, BV, BV, s.PREC, first is not None, back),
    )  # fmt: skip


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
    config, s = plan(v.dtype, v.device, *k.shape[2:], *v.shape[2:])
    a = activation or GIVEN
    M, N = chunk_count(k, cu_seqlens, s.C), sequence_count(k, cu_seqlens)
    chunks, spans, segments = locate(k, cu_seqlens, s.C, segment_length(config, M, N, s))
    q, k, v, log_decay, erase, write, initial_state = _dense(q, k, v, log_decay, erase, write, initial_state)
    # A wider write gate does not fit into the shared memory of the scan that would read it.
    wide = write is not None and write.element_size() > v.element_size()
    ready = save_for_backward or segments is not None or wide
    needed = Residuals._fields if save_for_backward else USED_BY_SCAN + ("X",) * ready
    specs = zip(Residuals._fields, residual_specs(k, v, erase, cu_seqlens))
    kept = Residuals(
        **{
            name: torch.empty(shape if name in needed else 0, dtype=dtype, device=v.device)
            for name, (shape, dtype) in specs
        }
    )
    before = torch.empty_like(kept.gamma)

    for strong in _launches(log_decay):
        BK, BV, warps, stages = config.strong_prepare if strong else config.prepare
        BK, BV = min(s.KP, BK), min(s.VP, BV)
        inputs: tuple[Any, ...] = (q, k, v, log_decay, erase, write)
        if not strong:
            inputs = tuple(_tiles(x, s.C, size) for x, size in zip(inputs, (BK, BK, BV, BK, BK, BV)))
        run(
            prepare_chunks, M * s.H,
            (*inputs, a.rate, a.delta, kept.E, kept.Q, kept.K_out, kept.gamma, before, kept.after, kept.X, kept.A,
             kept.A_out, chunks.token, chunks.length, kept.strong, scale, a.largest_erase, a.largest_write, L2_EPS),
            (s.H, s.HV, s.K, s.V, s.KP, s.VP, _last(log_decay), _last(erase), _last(write), s.C, s.LOG_C,
             BK, BV, s.RANGE, s.DT, s.PREC, s.SOLVE, save_for_backward, activation is not None, ready, strong),
            warps, stages,
        )  # fmt: skip
    o = torch.empty_like(v)
    state = initial_state
    if segments is not None:
        state = _before_segments(kept, initial_state, segments, config, s, erase is not None)
        spans = segments.spans
    S = len(spans.start) - 1
    exact: dict[str, Any] = {"dtype": torch.float32, "device": v.device}
    final = torch.empty(S, s.HV, s.K, s.V, **exact) if output_final_state else None
    BV, warps, stages = scan_tile(config, S, s)
    run(
        scan_chunks, S * s.HV * (s.VP // BV),
        (_tiles(v, s.C, BV), _tiles(write, s.C, BV), kept.E, kept.Q, kept.K_out, kept.gamma, before, kept.X,
         kept.A_out, state, o, final, kept.S, *spans, a.largest_write),
        (s.H, s.HV, s.K, s.V, s.KP, s.VP, _last(write), s.C, BV, stages, s.DT, s.PREC, erase is not None,
         state is not None, output_final_state, save_for_backward, activation is not None, ready),
        warps, stages,
    )  # fmt: skip
    if final is not None and segments is not None:
        final = final[segments.of[1:] - 1]
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
    config, s = plan(v.dtype, v.device, *k.shape[2:], *v.shape[2:])
    a, act = activation or GIVEN, activation is not None
    kept = Residuals(*residuals)
    M, N = chunk_count(k, cu_seqlens, s.C), sequence_count(k, cu_seqlens)
    chunks, spans, segments = locate(k, cu_seqlens, s.C, segment_length(config, M, N, s))
    do, dfinal_state, q, k, v, log_decay, erase, write = _dense(do, dfinal_state, q, k, v, log_decay, erase, write)
    dS, dZ, dA_qk, minus_dT = (torch.empty_like(x) for x in (kept.S, kept.X, kept.A_out, kept.A))
    dq, dk, dv, dg, db, dw = (
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_decay, erase, write)
    )
    exact: dict[str, Any] = {"dtype": torch.float32, "device": v.device}
    diagonal = torch.empty(M, s.H, s.C, **exact)
    # Key channels of a program: all of them where a gate that they share takes the sum of their gradients.
    span = s.KP if 1 in (_last(log_decay), _last(erase)) else min(s.KP, config.key[0])
    along_q, along_k = torch.empty(2, M, s.H, s.C, **exact) if act else (None, None)
    # Chunks that do not exist add nothing.
    drate = torch.zeros(M, s.H, s.KP // span, **exact) if a.rate is not None else None
    ddelta = torch.zeros(M, len(a.delta), **exact) if a.delta is not None else None

    dstate = dfinal_state
    if segments is not None:
        dstate = _after_segments(kept, do, dfinal_state, segments, config, s, erase is not None)
        spans = segments.spans
    S = len(spans.start) - 1
    dS_first = None if initial_state is None else torch.empty(S, s.HV, s.K, s.V, **exact)
    BV, warps, stages = scan_tile(config, S, s)
    run(
        scan_back, S * s.HV * (s.VP // BV),
        (kept.E, kept.Q, kept.K_out, kept.gamma, kept.after, kept.A_out, do, dstate, dS_first, dS, dZ, *spans),
        (s.H, s.HV, s.K, s.V, s.KP, s.VP, s.C, BV, stages, s.DT, s.PREC, erase is not None,
         initial_state is not None, dstate is not None),
        warps, stages,
    )  # fmt: skip
    if dS_first is not None and initial_state is not None:
        dS_first = (dS_first if segments is None else dS_first[segments.of[:-1]]).to(initial_state.dtype)
    BV, warps, stages = config.value
    run(
        value_gradients, M * s.H,
        (v, write, o, do, dZ, kept.X, kept.A, dv, dw, dA_qk, diagonal,
         minus_dT, along_q, along_k, chunks.token, chunks.length, a.largest_write),
        (s.H, s.HV, s.V, s.VP, _last(write), s.C, min(s.VP, BV), s.DT, s.PREC, s.SOLVE, erase is not None,
         act),
        warps, stages,
    )  # fmt: skip
    for strong in _launches(log_decay):
        BK, BV, warps, stages = config.strong_key if strong else config.key
        BK, BV = min(span, BK), min(s.VP, BV)
        inputs = (q, k, log_decay, erase, do, dZ, kept.X, kept.S, dS)
        if not strong:
            inputs = (
                *(_tiles(x, s.C, BK) for x in inputs[:4]),
                _tiles(do, s.C, BV),
                *(_descriptor(x, s.VP, s.C, BV) for x in (dZ, kept.X)),
                *(_descriptor(x, s.VP, BK, BV) for x in (kept.S, dS)),
            )
        run(
            key_gradients, M * s.H * (s.KP // span),
            (*inputs, kept.A, a.rate, a.delta, dA_qk, diagonal, minus_dT, along_q, along_k, dq, dk, dg, db, drate,
             ddelta, chunks.token, chunks.length, kept.strong, scale, a.largest_erase, L2_EPS),
            (s.H, s.HV, s.K, s.V, s.KP, s.VP, _last(log_decay), _last(erase), s.C, s.LOG_C,
             span, BK, BV, stages, s.RANGE, s.DT, s.PREC, act, strong),
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
    _, s = plan(v.dtype, v.device, H, K, HV, V)
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"state is {state.dtype} with strides {state.stride()}; expected contiguous float32")
    q, k, v, log_decay, erase, write, slots = _dense(q, k, v, log_decay, erase, write, slots)
    o = torch.empty_like(v)
    BV = min(16 if INTERPRET else 32, s.VP)
    run(
        step_token, N * HV * triton.cdiv(V, BV),
        (q, k, v, log_decay, erase, write, state, slots, o, scale),
        (H, HV, K, V, triton.next_power_of_2(K), BV, _last(log_decay), _last(erase), _last(write), slots is not None),
        4, 1,
    )  # fmt: skip
    return o
