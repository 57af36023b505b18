"""Every rule as gate settings of the one operator.

| rule               | log-decay       | erase       | write         |
| ------------------ | --------------- | ----------- | ------------- |
| Gated DeltaNet-2   | channel         | channel     | channel       |
| KDA                | channel         | scalar beta | the same beta |
| Gated DeltaNet     | scalar per head | scalar beta | the same beta |
| DeltaNet           | none            | scalar beta | the same beta |
| Mamba-2 (SSD)      | scalar per head | none        | scalar dt     |
| Mamba-3            | scalar per head | none        | see mamba3.py |

A scalar gate is handed over with one channel, [B, T, heads, 1], which the operator broadcasts: no copy is made, and its
gradient is the tied one, dL/dbeta = <dL/db, 1> + <dL/dw, 1> (48). Shapes, here and below: q, k [B, T, H, K];
v [B, T, HV, V] with HV a multiple of H; value head j uses key head j // (HV // H).
"""

from collections.abc import Callable

from torch import Tensor

from gdn2.ops.api import DTYPES, check, operator

Rule = Callable[..., tuple[Tensor, Tensor | None]]  # of the form of `gated_delta_rule_2`


def gated_delta_rule_2(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, erase: Tensor | None, write: Tensor | None, *,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated Delta Rule-2 (8-10): S_t = (I - k (b * k)^T) Diag(exp g) S_{t-1} + k (w * v)^T, o = S^T (scale * q).

    Args:
        q, k: [B, T, H, K]. Normalise them before; the operator does not.
        v: [B, T, HV, V].
        log_decay: g in nats, <= 0 (-inf forgets everything), [B, T, H, K] or [B, T, H, 1]; None for no decay.
        erase: b in [0, 1], or [0, 2] for negative eigenvalues, [B, T, H, K] or [B, T, H, 1]; None for no erasing.
        write: w, [B, T, HV, V] or [B, T, HV, 1]; None for 1.
        scale: multiplies q; K ** -0.5 when None.
        initial_state: [N, HV, K, V], zeros when None. N is B, or the number of packed sequences.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64, offsets that pack N sequences into B = 1; some may be empty. "triton" does
            not read those on a GPU, unless within `debug_checks`: what is no partition gives undefined outputs.
        backend: "reference" (token by token, the specification), "torch" (chunkwise, any device), "triton" (kernels for
            CUDA tensors of at most 32 bits and heads of at most 256 channels), or "auto": triton where it can, else
            torch.

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] or None. The state and all sums are float32
        (float64 for float64 inputs). Gradients flow to every floating-point input, from both results.

    Raises:
        ValueError: a shape, dtype, device, offset or backend that does not fit; the message names it.
        NotImplementedError: forward-mode differentiation, which "reference" alone has.
    """
    return operator(
        q, k, v, log_decay, erase, write, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip


def kda(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, *,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Kimi Delta Attention: channel-wise log_decay [B, T, H, K], one beta [B, T, HV] for erase and write."""
    q, k, log_decay, beta = _per_value_head(q, k, v, log_decay, beta)
    return operator(
        q, k, v, log_decay, beta, beta, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated DeltaNet: one log_decay [B, T, H] and one beta [B, T, HV] per head and token."""
    check(q, k, v)
    q, k, decay, beta = _per_value_head(q, k, v, _scalar("log_decay", log_decay, k), beta)
    return operator(
        q, k, v, decay, beta, beta, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """DeltaNet: one beta [B, T, HV] per head and token, no decay."""
    q, k, _, beta = _per_value_head(q, k, v, None, beta)
    return operator(
        q, k, v, None, beta, beta, scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip


def mamba2(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, write: Tensor, *,
    scale: float | None = 1.0, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Mamba-2's recurrence: q = C, k = B, v = x, log_decay = A * dt [B, T, H], write = dt [B, T, HV]; scale is 1."""
    check(q, k, v)
    return operator(
        q, k, v, _scalar("log_decay", log_decay, k), None, _scalar("write", write, v), scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip


def _scalar(name: str, gate: Tensor, x: Tensor) -> Tensor:
    """[B, T, heads] -> [B, T, heads, 1]."""
    if gate.shape != x.shape[:3]:
        raise ValueError(f"{name} has shape {list(gate.shape)}; expected {list(x.shape[:3])}, one per token and head")
    if gate.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {gate.dtype}; expected float64, float32, bfloat16 or float16")
    return gate.unsqueeze(-1)


def _per_value_head(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """q, k, log_decay and beta [B, T, HV, ...]: a beta per value head erases differently in each head of a group."""
    check(q, k, v, log_decay)  # before the heads are repeated: messages speak of the shapes that were given
    beta = _scalar("beta", beta, v)
    H, HV = k.shape[2], v.shape[2]
    if H == HV:
        return q, k, log_decay, beta
    G = HV // H
    decay = None if log_decay is None else log_decay.repeat_interleave(G, dim=2)
    return q.repeat_interleave(G, dim=2), k.repeat_interleave(G, dim=2), decay, beta
