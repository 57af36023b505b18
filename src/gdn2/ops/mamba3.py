"""Mamba-3's recurrence on the one operator: what goes before it and comes after.

Per head, with alpha = exp(A dt), zeta = lam dt, eta = (1 - lam) dt alpha, and R keys, values and queries per token:

    S_t = alpha_t S_{t-1} + eta_t sum_r k_{t-1,r} v_{t-1,r}^T + zeta_t sum_r k_{t,r} v_{t,r}^T;  o_{t,r} = S_t^T q_{t,r}

A token's own write thus comes in two parts: zeta_t now and, when the next token is there, late_t = (1 - lam) dt of that
one, before it decays. The operator writes both at once, zeta + late; what o_t then saw of late_t too early is taken off
again. The R writes of a token are R tokens to the operator, of which only the first decays: rank r has seen the ranks
s <= r alone, and the others are added. Both corrections are one R x R matrix per token:

    o_{t,r} += sum_s ([s > r] zeta_t - [s <= r] late_t) (q_{t,r} . k_{t,s}) v_{t,s}

At the end of a sequence late is 0; the state keeps the last keys and values, whose late part a following segment writes
into the memory first.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.api import operator
from gdn2.ops.layout import sequence_bounds
from gdn2.ops.library import without_autocast


class Mamba3Memory(NamedTuple):
    """What a sequence leaves: memory [N, H, K, V] float32, the last key [N, (R,) H, K] and value [N, (R,) H, V]."""

    memory: Tensor
    key: Tensor
    value: Tensor


def mamba3(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, dt: Tensor, lam: Tensor, *,
    scale: float | None = 1.0, initial_state: Mamba3Memory | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Mamba3Memory | None]:  # fmt: skip
    """Mamba-3's recurrence, as above, with q and k already rotated.

    Args:
        q, k: [B, T, H, K], or [B, T, R, H, K] with R keys and queries per token (MIMO).
        v: [B, T, H, V], or [B, T, R, H, V].
        log_decay: A dt in nats, <= 0, [B, T, H].
        dt: step > 0, [B, T, H]. lam: in [0, 1], the share of a step that the token itself writes, [B, T, H].
        scale: multiplies q; K ** -0.5 when None.
        initial_state: one row per sequence; None for zeros. N is B, or the number of packed sequences.
        output_final_state, cu_seqlens, backend: as for `gated_delta_rule_2`.

    Returns:
        o in v's shape and dtype, and the final state or None.

    Raises:
        ValueError: a shape, dtype, device, offset or backend that does not fit; the message names it.
    """
    _check(q, k, v, {"log_decay": log_decay, "dt": dt, "lam": lam}, initial_state, cu_seqlens)
    if k.dim() == 5:
        return _of_ranks(q, k, v, log_decay, dt, lam, scale, initial_state, output_final_state, cu_seqlens, backend)
    if initial_state is not None:
        initial_state = initial_state._replace(
            key=initial_state.key.unsqueeze(1), value=initial_state.value.unsqueeze(1)
        )
    o, after = _of_ranks(
        q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), log_decay, dt, lam, scale, initial_state, output_final_state,
        cu_seqlens, backend,
    )  # fmt: skip
    if after is not None:
        after = after._replace(key=after.key.squeeze(1), value=after.value.squeeze(1))
    return o.squeeze(2), after


@without_autocast
def _of_ranks(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, dt: Tensor, lam: Tensor, scale: float | None,
    initial_state: Mamba3Memory | None, output_final_state: bool, cu_seqlens: Tensor | None, backend: str,
) -> tuple[Tensor, Mamba3Memory | None]:  # fmt: skip
    """`mamba3` with a rank axis."""
    R = k.shape[2]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(dt.dtype, torch.float32)
    now, before = lam.to(wide) * dt, (1 - lam.to(wide)) * dt
    late = torch.cat([before[:, 1:], torch.zeros_like(before[:, :1])], dim=1)
    if cu_seqlens is not None:
        late = late.masked_fill(_is_last(cu_seqlens, k.shape[1])[:, None], 0)
    memory = None
    if initial_state is not None:
        first = _first_of_each(before, cu_seqlens)
        key, value = initial_state.key.to(first.dtype), initial_state.value.to(first.dtype)
        memory = initial_state.memory + torch.einsum("nrhk,nrhv->nhkv", first[:, None, :, None] * key, value)
    o, memory = operator(
        q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2),
        F.pad(log_decay.unsqueeze(2), (0, 0, 0, R - 1)).flatten(1, 2).unsqueeze(-1),
        None, (now + late).repeat_interleave(R, dim=1).unsqueeze(-1),
        scale=scale, initial_state=memory, output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else R * cu_seqlens, backend=backend,
    )  # fmt: skip
    seen = torch.ones(R, R, dtype=torch.bool, device=k.device).tril()
    weight = torch.where(seen, -late[..., None, None], now[..., None, None])
    products = torch.einsum("btrhk,btshk->bthrs", q.to(wide), k.to(wide)) * (scale * weight)
    o = o.unflatten(1, (-1, R)) + torch.einsum("bthrs,btshv->btrhv", products, v.to(wide))
    if memory is None:
        return o.to(v.dtype), None
    past = (None, None) if initial_state is None else initial_state[1:]
    return o.to(v.dtype), Mamba3Memory(memory, *(_last_of_each(x, p, cu_seqlens) for x, p in zip((k, v), past)))


def _is_last(cu_seqlens: Tensor, T: int) -> Tensor:
    """[T] bool: whether a token is its sequence's last."""
    ends = torch.zeros(T + 1, dtype=torch.bool, device=cu_seqlens.device)
    return ends.index_fill(0, cu_seqlens[1:].long(), True)[1:]


def _first_of_each(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x [B, T, H] at the first token of each sequence, [N, H]; 0 where there is none."""
    if cu_seqlens is None:
        return x[:, 0] if x.shape[1] else x.new_zeros(x.shape[0], x.shape[2])
    x = F.pad(x[0], (0, 0, 0, 1))  # an empty sequence may start behind the last token
    return x[cu_seqlens[:-1]].masked_fill((cu_seqlens.diff() == 0)[:, None], 0)


def _last_of_each(x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x [B, T, ...] at the last token of each sequence, [N, ...]; `past`, zeros when None, where there is none."""
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    past = x.new_zeros(N, *x.shape[2:]) if past is None else past.to(x.dtype)
    if cu_seqlens is None:
        return x[:, -1] if x.shape[1] else past
    last = torch.cat([x.new_zeros(1, *x.shape[2:]), x[0]])[cu_seqlens[1:]]
    return torch.where((cu_seqlens.diff() > 0).view(-1, *(1,) * (x.dim() - 2)), last, past)


def _check(
    q: Tensor, k: Tensor, v: Tensor, scalars: dict[str, Tensor], state: Mamba3Memory | None, cu_seqlens: Tensor | None
) -> None:
    """ValueError for what the operator, which sees the rearranged tensors, could not name."""
    if k.dim() not in (4, 5):
        raise ValueError(f"k has shape {list(k.shape)}; expected [B, T, H, K] or [B, T, R, H, K]")
    if q.shape != k.shape:
        raise ValueError(f"q has shape {list(q.shape)}; expected that of k, {list(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v has shape {list(v.shape)}; expected {[*k.shape[:-1], 'V']}")
    B, T, *ranks, H, _ = k.shape
    for name, x in scalars.items():
        if x.shape != (B, T, H):
            raise ValueError(f"{name} has shape {list(x.shape)}; expected {[B, T, H]}, one per token and head")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or B != 1:
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)} with B = {B}; expected int32 or "
                "int64 [N + 1] and B = 1"
            )
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            sequence_bounds(cu_seqlens, T)
    if state is not None:
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shapes = [[N, H, k.shape[-1], v.shape[-1]], [N, *ranks, H, k.shape[-1]], [N, *ranks, H, v.shape[-1]]]
        for name, part, shape in zip(state._fields, state, shapes):
            if list(part.shape) != shape:
                raise ValueError(f"the state's {name} has shape {list(part.shape)}; expected {shape}")
