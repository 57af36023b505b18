"""The operator as `torch.library` ops with fakes and autograd, so that `torch.compile(fullgraph=True)` sees one node.

The chunkwise backward is an op of its own. A gradient that is not there (no such input) is an empty tensor, since an op
returns a fixed number of tensors.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from gdn2.ops import chunk_torch
from gdn2.ops.layout import ChunkLayout
from gdn2.ops.reference import recurrence

CHUNK = 64

P = ParamSpec("P")
R = TypeVar("R")


def chunk_size(T: int) -> int:
    """Tokens per chunk: `CHUNK`, or the smallest power of two that holds a shorter sequence."""
    return min(CHUNK, 1 << max(T - 1, 0).bit_length())


def residual_shapes(k: Tensor, v: Tensor, erase: Tensor | None, cu_seqlens: Tensor | None) -> list[list[int]]:
    """Shapes of `chunk_torch.Saved`, known without reading cu_seqlens: each sequence adds at most one short chunk."""
    B, T, H, K = k.shape
    C = chunk_size(T)
    M = B * -(-T // C) if cu_seqlens is None else T // C + cu_seqlens.shape[0] - 1
    width = v.shape[2] // H * v.shape[3]
    return [[M * H, K, width], [M * H if erase is not None else 0, C, C], [M * H, C, C]]


def _state_shape(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return [N, v.shape[2], k.shape[3], v.shape[3]]


def _new(like: Tensor, shape: list[int]) -> Tensor:
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run an op's body in the dtypes it chose: autocast would reach into it and round the state and the sums."""

    @functools.wraps(function)
    def body(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(x for x in args if isinstance(x, Tensor)).device.type
        if device == "meta":  # which knows no autocast
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return body


@torch.library.custom_op("gdn2::chunk", mutates_args=())
@without_autocast
def chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, the final state, and what the backward needs (S, A, A_qk: empty unless `save`)."""
    if k.shape[1] == 1 and cu_seqlens is None and not save:  # a decoding step has no chunk to speak of
        o, state = recurrence(q, k, v, log_decay, erase, write, scale, initial_state)
        nothing = _new(v, [0])
        return o.to(v.dtype), state.contiguous(), nothing, nothing.clone(), nothing.clone()
    x = chunk_torch.Inputs(q, k, v, log_decay, erase, write, scale)
    layout = ChunkLayout(k.shape, cu_seqlens, chunk_size(k.shape[1]), k.device)
    shapes = residual_shapes(k, v, erase, cu_seqlens) if save else [[0]] * 3
    saved = chunk_torch.Saved(*(_new(v, shape) for shape in shapes))
    o, state = chunk_torch.forward(x, initial_state, layout, saved if save else None)
    for residual in (saved.S, saved.A, saved.A_qk):
        residual[layout.M * layout.H :] = 0  # packed sequences rarely fill them: an op's outputs depend on inputs alone
    return o, state, saved.S, saved.A, saved.A_qk


@chunk.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = residual_shapes(k, v, erase, cu_seqlens) if save else [[0]] * 3
    S, A, A_qk = (_new(v, shape) for shape in shapes)
    return v.new_empty(v.shape), _new(v, _state_shape(k, v, cu_seqlens)), S, A, A_qk


@torch.library.custom_op("gdn2::chunk_backward", mutates_args=())
@without_autocast
def chunk_backward(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None,
    write: Tensor | None, cu_seqlens: Tensor | None, scale: float, S: Tensor, A: Tensor, A_qk: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay, erase, write and the initial state."""
    x = chunk_torch.Inputs(q, k, v, log_decay, erase, write, scale)
    layout = ChunkLayout(k.shape, cu_seqlens, chunk_size(k.shape[1]), k.device)
    grads, d_initial = chunk_torch.backward(do, d_final, x, layout, chunk_torch.Saved(S, A, A_qk))
    names = ("q", "k", "v", "log_decay", "erase", "write")
    dq, dk, dv, dg, db, dw = (grads[n] if n in grads else q.new_empty(0) for n in names)
    return dq, dk, dv, dg, db, dw, d_initial


@chunk_backward.register_fake
def _(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None,
    write: Tensor | None, cu_seqlens: Tensor | None, scale: float, S: Tensor, A: Tensor, A_qk: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg, db, dw = (g.new_empty(g.shape) if g is not None else q.new_empty(0) for g in (log_decay, erase, write))
    d_initial = _new(v, _state_shape(k, v, cu_seqlens))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, db, dw, d_initial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial_state, cu_seqlens, scale, _ = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, *output[2:])
    ctx.scale = scale
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, do: Tensor, d_final: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens, S, A, A_qk = ctx.saved_tensors
    *grads, d_initial = chunk_backward(do, d_final, *tensors, cu_seqlens, ctx.scale, S, A, A_qk)
    d_inputs = [g if t is not None else None for g, t in zip(grads, tensors)]
    return *d_inputs, None if ctx.state_dtype is None else d_initial.to(ctx.state_dtype), None, None, None


chunk.register_autograd(_backward, setup_context=_setup)
