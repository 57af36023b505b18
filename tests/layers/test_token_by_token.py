"""Each mixer in every form it has against its own paper's recurrence, token by token: outputs, states and gradients."""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from token_by_token import (
    attention,
    delta_net,
    gated_delta_net,
    gated_delta_net_2,
    kimi_delta_attention,
    linear_attention,
    mamba2,
    mamba3,
)
from torch import Tensor, nn

from gdn2.layers import (
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    LinearAttention,
    Mamba2,
    Mamba3,
    SlidingWindowAttention,
)

# A chunk of the operator has 64 tokens: T crosses into a second one.
B, T, D_MODEL = 2, 67, 8
SIZES = {"d_model": D_MODEL, "num_heads": 2, "key_dim": 4, "value_dim": 5}

CASES: dict[str, tuple[Callable[[], nn.Module], Callable]] = {
    "gdn2": (lambda: GatedDeltaNet2(**SIZES), gated_delta_net_2),
    "gdn2, grouped values": (lambda: GatedDeltaNet2(**SIZES, num_value_heads=4), gated_delta_net_2),
    "gdn2, negative eigenvalues": (
        lambda: GatedDeltaNet2(**SIZES, negative_eigenvalues=True),
        partial(gated_delta_net_2, largest=2),
    ),
    "gdn2, write by channel alone": (
        lambda: GatedDeltaNet2(**SIZES, channel_erase=False),
        partial(gated_delta_net_2, by_channel=(False, True)),
    ),
    "gdn2, erase by channel alone": (
        lambda: GatedDeltaNet2(**SIZES, channel_write=False),
        partial(gated_delta_net_2, by_channel=(True, False)),
    ),
    "gdn2, bounded decay": (
        lambda: GatedDeltaNet2(**SIZES, decay_lower_bound=-5.0),
        partial(gated_delta_net_2, bound=-5),
    ),
    "kda": (lambda: KimiDeltaAttention(**SIZES), kimi_delta_attention),
    "kda, bounded decay": (
        lambda: KimiDeltaAttention(**SIZES, decay_lower_bound=-3.0),
        partial(kimi_delta_attention, bound=-3),
    ),
    "gdn": (lambda: GatedDeltaNet(**SIZES), gated_delta_net),
    "gdn, negative eigenvalues": (
        lambda: GatedDeltaNet(**SIZES, negative_eigenvalues=True),
        partial(gated_delta_net, largest=2),
    ),
    "deltanet": (lambda: DeltaNet(**SIZES), delta_net),
    "deltanet, negative eigenvalues": (
        lambda: DeltaNet(**SIZES, negative_eigenvalues=True),
        partial(delta_net, largest=2),
    ),
    "linear": (lambda: LinearAttention(**SIZES), linear_attention),
    "mamba2": (lambda: Mamba2(**SIZES, conv_width=3), mamba2),
    "mamba3": (lambda: Mamba3(**SIZES), mamba3),
    "mamba3, all channels rotated": (lambda: Mamba3(**SIZES, rope_fraction=1.0), mamba3),
    "mamba3, multi-input": (lambda: Mamba3(**SIZES, mimo_rank=4), mamba3),
}
# Window, rotary base, scaling, factor, length in training.
ATTENTION: dict[str, tuple] = {
    "window attention": (6, 100.0),
    "full attention": (None, 100.0),
    "full attention, NTK": (None, 100.0, "ntk", 4.0),
    "window attention, YaRN": (40, 100.0, "yarn", 4.0, 64),
}
for name, options in ATTENTION.items():
    keywords = dict(zip(("window", "base", "scaling", "factor", "length"), options))
    CASES[name] = partial(SlidingWindowAttention, D_MODEL, 2, *options), partial(attention, **keywords)


@cache
def expected(case: str) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor], list[Tensor]]:
    """A layer, its input, and what its recurrence says: output, parts of the state, gradients."""
    make, reference = CASES[case]
    torch.manual_seed(0)
    layer = make().double()
    kept = {"rate", "delta"}  # decays stay as they start; all else is so large that errors show
    for name, p in layer.named_parameters():
        if name.rsplit(".", 1)[-1] not in kept:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    x = torch.randn(B, T, D_MODEL, dtype=torch.float64, requires_grad=True)
    y, parts = reference(layer, x)
    return layer, x, y.detach(), {n: t.detach() for n, t in parts.items()}, gradients(layer, x, y, parts.get("memory"))


def gradients(layer: nn.Module, x: Tensor, y: Tensor, memory: Tensor | None) -> list[Tensor]:
    """Of a sum in which every number of the output, and of the memory if any, counts differently."""
    total = torch.zeros((), dtype=y.dtype)
    for t in (y, memory):
        if t is not None:
            total = total + (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum()
    return list(torch.autograd.grad(total, [x, *layer.parameters()]))


def whole(layer: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return layer(x)


def packed(layer: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, state = layer(x.flatten(0, 1)[None], None, torch.tensor([0, T, B * T]))
    return y.view(B, T, -1), state


def pieces(*cuts: int) -> Callable:
    def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        state, outputs = None, []
        for part in x.split(cuts, dim=1):
            y, state = layer(part, state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    return run


FORMS = {"whole": whole, "packed": packed, "step by step": pieces(*[1] * T), "split": pieces(1, 40, 0, T - 41)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_every_form_is_the_recurrence_with_its_gradients(case: str, form: str) -> None:
    layer, x, y, parts, gradient = expected(case)
    got, state = FORMS[form](layer, x)
    # Float64 on both sides: only the order of sums differs, over 67 tokens and, for the gradients, as many again.
    # Attention's angles are rounded to float32 (3e-7 for one near 2 pi), which moves its outputs and gradients alike.
    bound, gradient_bound = (2e-6, 2e-5) if "attention" in case else (1e-11, 1e-9)
    torch.testing.assert_close(got, y, rtol=bound, atol=bound)
    for name, part in parts.items():
        torch.testing.assert_close(getattr(state, name), part, rtol=bound, atol=bound)
    own = gradients(layer, x, got, getattr(state, "memory", None))
    for a, b in zip(own, gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=gradient_bound, atol=gradient_bound)
