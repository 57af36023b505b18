"""The operator from what a layer projects: keys and queries of any length, gates before their activation.

    q <- q / |q|    k <- k / |k|    log_decay = -exp(rate) softplus(decay + delta)                       (12)
    erase <- largest_erase * sigmoid(erase)    write <- largest_write * sigmoid(write)                   (11)

|x| = sqrt(sum x^2 + 1e-6). On a GPU all of it happens inside the operator's kernels, forward and backward: no activated
tensor is ever written. Elsewhere it is torch operations around `operator`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.api import check, kernels, operator, wants_gradient, without_kernels
from gdn2.ops.fused import fused

L2_EPS = 1e-6


def rule_from_projections(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    rate: Tensor | None,
    delta: Tensor | None,
    *,
    largest_erase: float = 1.0,
    largest_write: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_rule_2` with activations.

    Args:
        q, k: [B, T, H, K]. v: [B, T, HV, V].
        decay: [B, T, H, K or 1], None for no decay; erase: [B, T, H, K or 1], None for no erasing; write: [B, T, HV,
            V or 1], None for 1. All before their activation.
        rate: [H], delta: [H * K], or [H] where decay has one channel; float32; both None without decay.
        largest_erase, largest_write: what a gate reaches at most; 2 with negative eigenvalues.
        initial_state, output_final_state, cu_seqlens: as for `gated_delta_rule_2`.
        backend: as there; "auto" takes the kernels wherever the operations around the operator are fused.

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] or None.

    Raises:
        ValueError: shapes, dtypes and devices that do not fit, and a backend that cannot run here.
    """
    check(q, k, v, decay, erase, write, initial_state, cu_seqlens)
    heads, channels = k.shape[2], None if decay is None else k.shape[2] * decay.shape[3]
    for name, x, size in (("rate", rate, None if decay is None else heads), ("delta", delta, channels)):
        shape = None if x is None else list(x.shape)
        if shape != (None if size is None else [size]):
            raise ValueError(f"{name} has shape {shape}; expected {None if size is None else [size]}")
    if backend == "triton" or (backend == "auto" and fused(v) and without_kernels(k, v) is None):
        inputs = (q, k, v, decay, erase, write, initial_state, rate, delta)
        op, scale = kernels(k, v), k.shape[-1] ** -0.5
        options = True, wants_gradient(*inputs), output_final_state
        o, state = op(*inputs, cu_seqlens, scale, largest_erase, largest_write, *options)
        return o, state if output_final_state else None
    log_decay = None
    if decay is not None and rate is not None and delta is not None:
        log_decay = log_decay_of(decay, rate, delta)
    return operator(
        unit_length(q), unit_length(k), v, log_decay,
        None if erase is None else largest_erase * torch.sigmoid(erase),
        None if write is None else largest_write * torch.sigmoid(write),
        scale=None, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        backend=backend,
    )  # fmt: skip


def log_decay_of(f: Tensor, rate: Tensor, delta: Tensor) -> Tensor:
    """-exp(rate) softplus(f + delta) for f [B, T, H, K], in delta's dtype, at least float32."""
    f = f.to(torch.promote_types(delta.dtype, torch.float32))
    return -rate.exp()[:, None] * F.softplus(f + delta.view(f.shape[2:]))


def unit_length(x: Tensor, eps: float = L2_EPS) -> Tensor:
    """x over its length along the last axis. With eps under the root, a zero vector and its gradient stay finite."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
