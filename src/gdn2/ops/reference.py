"""Gated Delta Rule-2, one token at a time: the specification that every other path is held to.

Legend (one head; equation numbers are those of arXiv 2605.22791):

    S  state, a [K, V] matrix that maps keys to values      q, k  query and key, [K]      v  value, [V]
    g  log-decay in nats, <= 0, [K]         b  erase gate, [K]       w  write gate, [V]
    e = b * k   the erase direction         z = w * v  the content to commit               (8)
    r = Sbar^T e  what the decayed state Sbar = Diag(exp g) S already holds there          (9)

Per token the state decays, what it holds along e is read out, and k is bound to the difference:

    S <- Sbar + k (z - r)^T         o = S^T (scale * q)                                    (9, 10)

Never optimised: it is here to be read, and to be right.
"""

import torch
from torch import Tensor


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
    scale: float,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run equation (9) over ``T`` tokens of ``B`` independent sequences.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V]; value head j reads and writes with key head j // (HV // H).
        log_decay, erase: broadcastable to [B, T, H, K]; None means no decay (0) and no erasing (0).
        write: broadcastable to [B, T, HV, V]; None means 1.
        scale: multiplies q.
        initial_state: [B, HV, K, V], zeros when None.

    Returns:
        o [B, T, HV, V] and the final state [B, HV, K, V], in the accumulation dtype: that of the inputs, at least
        float32. Differentiable in every tensor.
    """
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    dtype = torch.promote_types(v.dtype, torch.float32)

    def on_value_heads(x: Tensor) -> Tensor:
        return x.to(dtype).expand(B, T, H, K).repeat_interleave(HV // H, dim=2)

    q, k = on_value_heads(q), on_value_heads(k)
    g = on_value_heads(log_decay) if log_decay is not None else torch.zeros_like(k)
    b = on_value_heads(erase) if erase is not None else torch.zeros_like(k)
    v = v.to(dtype)
    w = write.to(dtype).expand_as(v) if write is not None else torch.ones_like(v)

    S = v.new_zeros(B, HV, K, V) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        e = b[:, t] * k[:, t]
        z = w[:, t] * v[:, t]
        Sbar = g[:, t].exp().unsqueeze(-1) * S
        r = torch.einsum("bhkv,bhk->bhv", Sbar, e)
        S = Sbar + torch.einsum("bhk,bhv->bhkv", k[:, t], z - r)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    o = torch.stack(outputs, dim=1) if outputs else v.new_zeros(B, 0, HV, V)
    return o, S
