"""Sequences whose tokens lie on four ranks against the same in one process, in float64: outputs, states, gradients."""

import copy
import os
from functools import partial

import torch
import torch.distributed as dist

from gdn2.data import Batch
from gdn2.layers import DeltaNet, GatedDeltaNet, GatedDeltaNet2, KimiDeltaAttention, LinearAttention, Mamba2
from gdn2.layers import SlidingWindowAttention as Attention
from gdn2.ops import gated_delta_rule_2
from gdn2.training.context import Context, across_ranks, affine_map, share_context

EXACT = 1e-11  # float64, sums in another order
T = 48  # 12 tokens a rank
PACKED = {  # starts inside parts, on their edges, several in one part, one over three parts, empty ones
    "whole": None,
    "inside": [0, 5, 29, T],
    "edges": [0, 12, 36, T],
    "many": [0, 1, 2, 2, 13, 14, 24, 24, 47, T],
}
MIXERS = {
    "gdn2": partial(GatedDeltaNet2, 8, 2, 4, key_dim=6, value_dim=4),
    "gdn2 by head": partial(GatedDeltaNet2, 8, 2, key_dim=4, value_dim=6, channel_erase=False, channel_write=False),
    "kda": partial(KimiDeltaAttention, 8, 2, key_dim=6, value_dim=4, negative_eigenvalues=True),
    "gdn": partial(GatedDeltaNet, 8, 2, key_dim=4, value_dim=4, conv_width=1),
    "deltanet": partial(DeltaNet, 8, 2, key_dim=4, value_dim=4),
    "linear": partial(LinearAttention, 8, 2, key_dim=4, value_dim=4),
    "mamba2": partial(Mamba2, 8, 2, key_dim=4, value_dim=6),
    "window 5": partial(Attention, 8, 2, window=5),
    "window 12": partial(Attention, 8, 2, window=12),
    "window 30": partial(Attention, 8, 2, window=30),
    "full": partial(Attention, 8, 2),
}


def part_of(context, x):
    n = x.shape[1] // context.size
    return x[:, context.rank * n : (context.rank + 1) * n]


def near(name, own, whole):
    assert own.shape == whole.shape, f"{name}: {own.shape}, {whole.shape}"
    if not whole.numel():
        return
    gap = float((own - whole).detach().abs().max())
    assert gap < EXACT * max(1.0, float(whole.detach().abs().max())), f"{name}: off by {gap}"


def cut(context, rows, cuts):
    """Tell the context of a batch; this rank's offsets."""
    tokens = torch.zeros(rows, T, dtype=torch.int64)
    return context.take(Batch(tokens, tokens, None if cuts is None else torch.tensor(cuts))).cu_seqlens


def check_operator(context, name, cuts):
    torch.manual_seed(1)
    H, HV, K, V = 2, 4, 6, 4
    rows = 1 if cuts else 2

    def draw(*shape):
        return torch.randn(rows, T, *shape, dtype=torch.float64)

    q, k, v = draw(H, K), torch.nn.functional.normalize(draw(H, K), dim=-1), draw(HV, V)
    gates = -draw(H, K).square(), 2 * torch.sigmoid(draw(H, K)), torch.sigmoid(draw(HV, V))
    do = draw(HV, V)
    whole = [t.clone().requires_grad_() for t in (q, k, v, *gates)]
    o, _ = gated_delta_rule_2(*whole, cu_seqlens=None if cuts is None else torch.tensor(cuts))
    o.backward(do)
    offsets = cut(context, rows, cuts)
    own = [part_of(context, t).clone().requires_grad_() for t in (q, k, v, *gates)]
    mine, state = across_ranks(gated_delta_rule_2, own, context, offsets)
    assert state is None
    mine.backward(part_of(context, do))
    near(f"{name}: o", mine, part_of(context, o))
    for what, a, b in zip("qkvgbw", own, whole):
        near(f"{name}: d{what}", a.grad, part_of(context, b.grad))


def check_map():
    """M S + N is the state after, for any S, in one process."""
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 10, 2, 4, dtype=torch.float64)
    gates = -torch.rand(2, 10, 2, 4, dtype=torch.float64), *torch.rand(2, 2, 10, 2, 4, dtype=torch.float64)
    S = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    M, N = affine_map(gated_delta_rule_2, (q, k, v, *gates))
    _, after = gated_delta_rule_2(q, k, v, *gates, initial_state=S, output_final_state=True)
    near("map", M @ S + N, after)


def check_mixer(context, name, make, cuts):
    torch.manual_seed(3)
    mixer = make().double()
    x = torch.randn(1 if cuts else 2, T, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    shared = copy.deepcopy(mixer)
    y, _ = mixer(x, None, None if cuts is None else torch.tensor(cuts), False)
    y.backward(dy)
    share_context(torch.nn.ModuleList([shared]), context)
    offsets = cut(context, x.shape[0], cuts)
    own = part_of(context, x).detach().clone().requires_grad_()
    mine, state = shared(own, None, offsets, False)
    assert state is None
    mine.backward(part_of(context, dy))
    near(f"{name}: y", mine, part_of(context, y))
    with torch.no_grad():
        _, states = mixer(x, None, None if cuts is None else torch.tensor(cuts))
        _, after = shared(own, None, offsets, True)
    ends = [context.size * own.shape[1]] if cuts is None else cuts[1:]
    here = range(context.rank * own.shape[1] + 1, (context.rank + 1) * own.shape[1] + 1)
    ended = [i for i, end in enumerate(ends) if end in here and (cuts is None or end > cuts[i])]
    for what, a, b in zip(states._fields, after, states):
        a = context.ended(a, offsets)
        b = b[ended] if cuts else b[slice(None) if ended else slice(0)]
        if a.shape[1:] != b.shape[1:]:  # full attention: room for the longest sequence, which may not be this rank's
            b = b[:, : a.shape[1]]
        near(f"{name}: {what}", a, b)
    near(f"{name}: dx", own.grad, part_of(context, x.grad))
    for (what, a), b in zip(shared.named_parameters(), mixer.parameters()):
        total = a.grad.clone()
        dist.all_reduce(total)
        near(f"{name}: {what}", total, b.grad)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    context = Context(dist.group.WORLD)
    check_map()
    checked = 0
    for packing, cuts in PACKED.items():
        check_operator(context, packing, cuts)
        for name, make in MIXERS.items():
            if packing in ("whole", "many") or name in ("gdn2", "window 12", "full"):
                check_mixer(context, f"{name}, {packing}", make, cuts)
                checked += 1
    dist.barrier()
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        print("checked", checked, flush=True)


main()
