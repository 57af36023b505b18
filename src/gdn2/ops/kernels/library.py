"""The Triton kernels as ops with fakes and autograd (`op.py`), as `gdn2.ops.library` does for the chunk form."""

from typing import Any

import torch
from torch import Tensor

from gdn2.ops.fused import is_planning
from gdn2.ops.kernels import launch
from gdn2.ops.kernels.configs import shared_memory
from gdn2.ops.kernels.op import op
from gdn2.ops.kernels.run import INTERPRET
from gdn2.ops.kernels.tables import LEAST_SHARED, MAX_HEAD

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def obstacle(v: Tensor, K: int) -> str | None:
    """What keeps the kernels from v [B, T, HV, V] and key size K, as the end of a sentence; None if they can run."""
    if v.device.type != "cuda" and not INTERPRET and not is_planning():
        return f"need CUDA tensors, and v is on {v.device}"
    if v.dtype not in DTYPES:
        return f"take bfloat16, float16 and float32, and v has dtype {v.dtype}"
    if max(K, v.shape[-1]) > MAX_HEAD:
        return f"take head sizes up to {MAX_HEAD}, and here K = {K}, V = {v.shape[-1]}"
    if shared_memory(v.device) < LEAST_SHARED:
        kilobytes = shared_memory(v.device) // 1024
        return f"need {LEAST_SHARED // 1024} KB of shared memory a program, and {v.device} has {kilobytes} KB"
    return None


def _activation(
    rate: Tensor | None, delta: Tensor | None, largest_erase: float, largest_write: float, projected: bool
) -> launch.Activation | None:
    if not projected:
        return None
    rate, delta = (None if x is None else x.contiguous() for x in (rate, delta))
    return launch.Activation(rate, delta, largest_erase, largest_write)


@op("gdn2::triton")
def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None,
    initial_state: Tensor | None, rate: Tensor | None, delta: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    largest_erase: float, largest_write: float, projected: bool, save: bool, final: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """o, the final state (empty unless `final`), and `launch.Residuals` (none unless `save`).

    `projected` says that q, k and the gates are what a layer projects; only then do rate, delta and the largest count.
    """
    if k.shape[1] == 1 and cu_seqlens is None and not save and not projected:  # one token has no chunk to speak of
        state = v.new_zeros(_state_shape(k, v, None), dtype=torch.float32)
        if initial_state is not None:
            state.copy_(initial_state)
        g, b, w = (None if gate is None else gate[:, 0] for gate in (log_decay, erase, write))
        o = launch.step(q[:, 0], k[:, 0], v[:, 0], g, b, w, scale, state)
        return o.unsqueeze(1), state, []
    o, after, kept = launch.forward(
        q, k, v, log_decay, erase, write, scale, initial_state, cu_seqlens, output_final_state=final,
        save_for_backward=save, activation=_activation(rate, delta, largest_erase, largest_write, projected),
    )  # fmt: skip
    return o, v.new_empty(0, dtype=torch.float32) if after is None else after, list(kept)


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None,
    initial_state: Tensor | None, rate: Tensor | None, delta: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    largest_erase: float, largest_write: float, projected: bool, save: bool, final: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    one = k.shape[1] == 1 and cu_seqlens is None and not save and not projected
    state = v.new_empty(_state_shape(k, v, cu_seqlens) if final or one else 0, dtype=torch.float32)
    specs = launch.residual_specs(k, v, erase, cu_seqlens)
    kept = [v.new_empty(shape, dtype=dtype) for shape, dtype in specs] if save else []
    return v.new_empty(v.shape), state, kept


def _state_shape(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return [N, v.shape[2], k.shape[3], v.shape[3]]


@op("gdn2::triton_backward")
def backward(
    do: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None,
    write: Tensor | None, initial_state: Tensor | None, rate: Tensor | None, delta: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, largest_erase: float, largest_write: float, o: Tensor | None,
    kept: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the nine tensors from q to delta; empty where there is no such input. o is there for projections."""
    activation = _activation(rate, delta, largest_erase, largest_write, o is not None)
    gradients = launch.backward(
        do, d_final, q, k, v, log_decay, erase, write, scale, initial_state, cu_seqlens, tuple(kept), activation, o
    )
    wanted = (*gradients, None, None)[:9]
    return [q.new_empty(0) if x is None else x for x in wanted]


@backward.register_fake
def _(
    do: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None,
    write: Tensor | None, initial_state: Tensor | None, rate: Tensor | None, delta: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, largest_erase: float, largest_write: float, o: Tensor | None,
    kept: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    inputs = (q, k, v, log_decay, erase, write, initial_state, rate, delta)
    return [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    *tensors, ctx.scale, ctx.largest_erase, ctx.largest_write, projected, _, _ = inputs
    ctx.set_materialize_grads(False)  # or every residual gets a gradient of zeros
    ctx.save_for_backward(*tensors, output[0] if projected else None, *output[2])


def _gradients(ctx: Any, do: Tensor | None, d_final: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
    *tensors, cu_seqlens, o = saved[:11]
    do = torch.zeros_like(tensors[2]) if do is None else do
    grads = backward(
        do, d_final, *tensors, cu_seqlens, ctx.scale, ctx.largest_erase, ctx.largest_write, o,
        list(saved[11:]),
    )  # fmt: skip
    return *(g if t is not None else None for g, t in zip(grads, tensors)), *[None] * 7


forward.register_autograd(_gradients, setup_context=_setup)


def rule(*inputs: Any) -> tuple[Tensor, Tensor]:
    """o and the final state; arguments as for `forward`."""
    o, state, _ = forward(*inputs)
    return o, state
