"""Context parallelism: each rank has a part of every sequence's tokens, one after another.

What a layer needs of the tokens before its part comes from the ranks before. For convolutions and window attention that
is a halo: the last inputs of the layer before the part. For the memory of a linear recurrence it is the state there. A
part is affine in the state S before it: the state after it is M S + N. So all ranks find their M and N side by side,
exchange them, and each folds those before its own; then the operator runs from the true state, exactly. Backward the
gradient dE of the state after a part gives M^T dE + N' before it, with N' what the part's own outputs give: the same
fold from the last rank to the first. M is what the operator makes of an identity matrix with nothing written.

Layers stay as they are: `share_context` gives each mixer of a model a `forward` that first fetches its state. The state
that it returns, without gradients only, is that after this rank's tokens of each sequence.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.data import Batch
from gdn2.layers import Mamba2, SlidingWindowAttention
from gdn2.layers.delta import DeltaMixer
from gdn2.layers.state import AttentionState, DeltaState, Mamba2State, join_states
from gdn2.ops.rules import Rule
from gdn2.ops.short_conv import short_conv

WRITE = 5  # among the inputs of a rule


class Part(NamedTuple):
    """How one batch is cut over the ranks.

    history: tokens of this part's first sequence that lie on ranks before. fresh: for each rank, whether a sequence
    starts exactly with its part. broken: whether one starts inside it.
    """

    history: int
    fresh: tuple[bool, ...]
    broken: tuple[bool, ...]


class Context:
    """The ranks of one context, this one's place among them, and how the batch being worked on is cut."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.part = Part(0, (True,) * self.size, (False,) * self.size)

    def take(self, batch: Batch) -> Batch:
        """This rank's tokens of a batch, whose passes must follow before the next is taken.

        ValueError where the tokens do not divide by the number of ranks.
        """
        T = batch.tokens.shape[1]
        if T % self.size:
            raise ValueError(f"the batch has {T} tokens in a row; expected a multiple of {self.size} context ranks")
        length = T // self.size
        bounds = [0, T] if batch.cu_seqlens is None else sorted({*batch.cu_seqlens.tolist()})
        begin, end = self.rank * length, (self.rank + 1) * length
        inside = [b for b in bounds if begin < b < end]
        starts = [rank * length for rank in range(self.size)]
        self.part = Part(
            begin - max(b for b in bounds if b <= begin),
            tuple(start in bounds for start in starts),
            tuple(any(start < b < start + length for b in bounds) for start in starts),
        )
        cuts = None if batch.cu_seqlens is None else torch.tensor([0, *(b - begin for b in inside), length])
        return Batch(batch.tokens[:, begin:end].contiguous(), batch.targets[:, begin:end].contiguous(), cuts)

    def ended(self, states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Those of the states [N, ...] after this rank's tokens that are after a whole sequence."""
        if self.rank == self.size - 1 or self.part.fresh[self.rank + 1]:
            return states
        return states[:0] if cu_seqlens is None else states[:-1]  # the last packed one goes on with the next rank

    def halo(self, x: Tensor, tokens: int | None) -> Tensor:
        """The `tokens` inputs [B, tokens, D] before this rank's x [B, T, D], all there are for None.

        Those that are not of the sequence that x begins with are zeros.
        """
        wanted = self.rank * x.shape[1] if tokens is None else tokens
        before = _Halo.apply(x, wanted, min(wanted, x.shape[1]) if tokens is not None else x.shape[1], self)
        strangers = wanted - min(self.part.history, wanted)
        mask = torch.arange(wanted, device=x.device) >= strangers
        return torch.where(mask[:, None], before, 0)

    def gather(self, x: Tensor) -> list[Tensor]:
        """x of each rank, first to last."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def state_before(self, M: Tensor, N: Tensor) -> Tensor:
        """The state [B, HV, K, V] before this rank's part, from every rank's M [B, HV, K, K] and N [B, HV, K, V]."""
        state = torch.zeros_like(N)
        for rank, (m, n) in enumerate(zip(self.gather(M), self.gather(N))):
            if rank == self.rank:
                break
            after = n if self.part.broken[rank] else m @ state + n
            state = torch.zeros_like(after) if self.part.fresh[rank + 1] else after
        return state

    def gradient_after(self, M: Tensor, own: Tensor) -> Tensor:
        """The gradient of the state after this rank's part; `own` [B, HV, K, V] is that of the state before each part
        by the part's own outputs."""
        gradient = torch.zeros_like(own)
        parts = list(zip(self.gather(M), self.gather(own)))
        for rank in reversed(range(self.rank + 1, self.size)):
            m, n = parts[rank]
            before = n if self.part.broken[rank] else m.mT @ gradient + n
            gradient = torch.zeros_like(before) if self.part.fresh[rank] else before
        return gradient


class _Halo(torch.autograd.Function):
    """Gathers the last `sent` tokens of each rank's x; gives the last `wanted` before this rank, zeros at the front."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wanted: int, sent: int, context: Context) -> Tensor:
        ctx.sizes, ctx.context, ctx.shape = (wanted, sent), context, x.shape
        tails = context.gather(x[:, x.shape[1] - sent :])
        before = torch.cat([x[:, :0], *tails[: context.rank]], dim=1)
        before = before[:, max(before.shape[1] - wanted, 0) :]
        return F.pad(before, (0, 0, wanted - before.shape[1], 0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (wanted, sent), context, shape = ctx.sizes, ctx.context, ctx.shape
        every = gradient.new_zeros(shape[0], context.size * sent, shape[2])  # of the tails, in the ranks' order
        end = context.rank * sent
        kept = min(wanted, end)
        every[:, end - kept : end] = gradient[:, wanted - kept :]
        dist.all_reduce(every, group=context.group)
        dx = gradient.new_zeros(shape)
        dx[:, shape[1] - sent :] = every[:, end : end + sent]
        return dx, None, None, None


def across_ranks(
    rule: Rule,
    inputs: Sequence[Tensor | None],
    context: Context,
    cu_seqlens: Tensor | None = None,
    output_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A rule over sequences whose tokens lie on all ranks of `context`: this rank's outputs.

    Args:
        rule: the operator, in the form of `DeltaMixer.rule`.
        inputs: of this rank's tokens: q, k, v, decay, erase, write, and what has no tokens. Gradients flow to all.
        cu_seqlens: as `Context.take` made it.
        output_state: return a state too, through which no gradients flow.

    Returns:
        o [B, T, HV, V], T being this rank's tokens, and the state [N, HV, K, V] after those of each sequence, or None.
    """
    o, state = _AcrossRanks.apply(rule, context, cu_seqlens, output_state, *inputs)
    return o, state


class _AcrossRanks(torch.autograd.Function):
    """Keeps inputs only, and runs the rule again in the backward pass: that needs its gradients twice, first those by
    the outputs, for the other ranks, then those by the state after the part, from them."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        context: Context,
        cu_seqlens: Tensor | None,
        output_state: bool,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        M, N = affine_map(rule, inputs, cu_seqlens)
        start = context.state_before(M, N)
        first = _first(start, cu_seqlens)
        o, state = rule(*inputs, initial_state=first, output_final_state=output_state, cu_seqlens=cu_seqlens)
        if state is not None:
            ctx.mark_non_differentiable(state)
        ctx.save_for_backward(M, start, cu_seqlens, *inputs)
        device = start.device.type
        ctx.call = rule, context
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return o, state

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        M, start, cu_seqlens, *inputs = ctx.saved_tensors
        rule, context = ctx.call
        needed = ctx.needs_input_grad[4:]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            leaves = [None if t is None else t.detach().requires_grad_(grad) for t, grad in zip(inputs, needed)]
            start = start.detach().requires_grad_()
            first = _first(start, cu_seqlens)
            o, final = rule(*leaves, initial_state=first, output_final_state=True, cu_seqlens=cu_seqlens)
            assert final is not None
            final = final if cu_seqlens is None else final[-1:]
        wanted = [t for t, grad in zip(leaves, needed) if grad and t is not None]
        *by_outputs, own = torch.autograd.grad(o, [*wanted, start], do, retain_graph=True)
        after = context.gradient_after(M, own).to(final.dtype)
        by_state = torch.autograd.grad(final, wanted, after, allow_unused=True)
        sums = iter([a if b is None else a + b for a, b in zip(by_outputs, by_state)])
        return None, None, None, None, *(next(sums) if grad else None for grad in needed)


def _first(start: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The states before the sequences of this part, all but the first of which start in it."""
    others = 0 if cu_seqlens is None else len(cu_seqlens) - 2
    return F.pad(start, (0, 0) * 3 + (0, others))


@torch.no_grad()
def affine_map(rule: Rule, inputs: Sequence[Tensor | None], cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """M [B, HV, K, K] and N [B, HV, K, V]: a state S before these tokens is M S + N after them.

    With several packed sequences it is the last one's, whose state does not come from S: its M is not to be used.
    """
    if cu_seqlens is not None:  # only the last sequence reaches the end
        begin = int(cu_seqlens[-2])
        inputs = [t[:, begin:] if t is not None and t.ndim == 4 else t for t in inputs]
    _, k, v, *_ = inputs
    assert k is not None
    assert v is not None
    (B, T, H, K), HV = k.shape, v.shape[2]
    _, N = rule(*inputs, output_final_state=True)
    silent = list(inputs)
    silent[2] = v.new_zeros(B, T, H, K)
    write = inputs[WRITE]
    silent[WRITE] = None if write is None else write[:, :, :H, :1].contiguous()
    assert N is not None
    identity = torch.eye(K, dtype=N.dtype, device=N.device).repeat(B, H, 1, 1)
    _, M = rule(*silent, initial_state=identity, output_final_state=True)
    assert M is not None
    return M.repeat_interleave(HV // H, dim=1), N


def share_context(model: nn.Module, context: Context) -> None:
    """Let the mixers of a model work on a part of each sequence, in place; `parallel.CONTEXT` names those that can."""
    for module in model.modules():
        if isinstance(module, DeltaMixer):
            module.forward = partial(_delta_forward, module, context)  # type: ignore[method-assign]
        elif isinstance(module, Mamba2):
            module.forward = partial(_mamba2_forward, module, context)  # type: ignore[method-assign]
        elif isinstance(module, SlidingWindowAttention):
            module.forward = partial(_attention_forward, module, context)  # type: ignore[method-assign]


def _delta_forward(
    mixer: DeltaMixer, context: Context, x: Tensor, state: None = None, cu_seqlens: Tensor | None = None,
    output_state: bool = False,
) -> tuple[Tensor, DeltaState | None]:  # fmt: skip
    """`DeltaMixer.forward` for this rank's tokens."""
    _check(state, output_state)
    before = context.halo(x, mixer.conv_width - 1)
    others = 0 if cu_seqlens is None else len(cu_seqlens) - 2
    tails = [F.pad(project(before), (0, 0, 0, 0, 0, others)) for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    (q, k, v), after = mixer.convolve(x, (tails[0], tails[1], tails[2]), cu_seqlens, output_state)
    o, memory = across_ranks(*mixer.rule(q, k, v, x), context, cu_seqlens, output_state)
    y = mixer.out_proj(mixer.read_out(o, x).flatten(-2))
    return y, None if after is None or memory is None else DeltaState(*after, memory)


def _mamba2_forward(
    mixer: Mamba2, context: Context, x: Tensor, state: None = None, cu_seqlens: Tensor | None = None,
    output_state: bool = False,
) -> tuple[Tensor, Mamba2State | None]:  # fmt: skip
    """`Mamba2.forward` for this rank's tokens."""
    _check(state, output_state)
    before = mixer.in_proj(context.halo(x, mixer.conv_width - 1)).split(mixer.widths, dim=-1)[1]
    others = 0 if cu_seqlens is None else len(cu_seqlens) - 2
    z, u, dt = mixer.in_proj(x).split(mixer.widths, dim=-1)
    u, conv = short_conv(u, mixer.conv, F.pad(before, (0, 0, 0, 0, 0, others)), cu_seqlens, output_state)
    rule, inputs = mixer.rule(u, dt)
    o, memory = across_ranks(rule, inputs, context, cu_seqlens, output_state)
    y = mixer.read_out(o, inputs[2], z, x.dtype)
    return y, None if conv is None or memory is None else Mamba2State(conv, memory)


def _attention_forward(
    mixer: SlidingWindowAttention, context: Context, x: Tensor, state: None = None, cu_seqlens: Tensor | None = None,
    output_state: bool = False,
) -> tuple[Tensor, AttentionState | None]:  # fmt: skip
    """`SlidingWindowAttention.forward` for this rank's tokens."""
    _check(state, output_state)
    before = context.halo(x, mixer.window)
    if mixer.window is None:
        before = before[:, before.shape[1] - context.part.history :]
    first = mixer.state_after(before, context.part.history)
    forward = type(mixer).forward
    if cu_seqlens is None or len(cu_seqlens) == 2:
        return forward(mixer, x, first, output_state=output_state)
    end = int(cu_seqlens[1])  # of the sequence that began before; the others begin here
    own, after = forward(mixer, x[:, :end], first, output_state=output_state)
    others, more = forward(mixer, x[:, end:], None, cu_seqlens[1:] - end, output_state)
    state = None if after is None or more is None else join_states([(after,), (more,)])[0]
    return torch.cat([own, others], dim=1), state


def _check(state: object, output_state: bool) -> None:
    if state is not None:
        raise ValueError("a state was given; expected none where tokens are spread over ranks")
    if output_state and torch.is_grad_enabled():
        raise ValueError(
            "a state was asked for with gradients; expected torch.no_grad where tokens are spread over ranks"
        )
