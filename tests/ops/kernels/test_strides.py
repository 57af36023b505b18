"""Every launcher takes operands that do not lie in one piece, small ones too, and gives the same bits as for a copy."""

import pytest
import torch
from torch import Tensor

from gdn2.ops.kernels import (
    attend,
    conv,
    cross_entropy,
    decode,
    launch,
    library,
    matvec,
    norm,
    project,
    rotary,
    swiglu,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITHOUT_GRADIENTS = (
    "step", "decode", "attention", "step's sum and norm", "step's SwiGLU", "projection", "8 bits",
)  # fmt: skip


def normal(*shape):
    return torch.randn(*shape, device=DEVICE)


def integers(*values):
    return torch.tensor(values, device=DEVICE)


def rule(*inputs):
    return library.forward(*inputs, 0.3, 2.0, 1.0, True, True, True)[:2]


def step(*inputs):
    *tokens, state, slots = inputs
    state = state.clone()
    return launch.step(*tokens, 0.3, state, slots), state


def decoded(*inputs):
    token, weights, state = decode.Token(*inputs[:7]), decode.Weights(*inputs[7:13]), inputs[13:17]
    pool = decode.State(*(x.clone(memory_format=torch.contiguous_format) for x in state))
    y = decode.decode_in_place(token, weights, pool, inputs[17], scale=0.3, largest_erase=1.0, norm_eps=1e-5)
    return y, *pool


def attended(*inputs):
    *first, keys, values, position = inputs
    rings = [x.clone(memory_format=torch.contiguous_format) for x in (keys, values, position)]
    return attend.attend(*first, *rings, 0.3), *rings


def calls():
    torch.manual_seed(0)
    x, weight, w = normal(3, 16), normal(16), normal(1, 20, 2, 16)
    tokens = [normal(2, 2, 16).sigmoid() for _ in range(6)]
    projected = [normal(2, 32) for _ in range(7)]
    around = [normal(32, 4), normal(32, 4), normal(32, 4), normal(2), normal(32), normal(16)]
    state = [normal(4, 3, 32), normal(4, 3, 32), normal(4, 3, 32), normal(4, 2, 16, 16)]
    heads = [normal(2, 2, 8) for _ in range(3)]
    offsets, slots = integers(0, 3, 3, 20), integers(3, 1)
    ring = [normal(2, 5, 2, 8), normal(2, 5, 2, 8), integers(2, 9)]
    codes = torch.randint(-9, 9, (5, 16), device=DEVICE, dtype=torch.int8)
    return {
        "rule": (rule, (w, w.cos(), w.sin(), w, w, w, normal(3, 2, 16, 16), normal(2), normal(32), offsets)),
        "step": (step, (*tokens, normal(4, 2, 16, 16), slots)),
        "decode": (decoded, (*projected, *around, *state, slots)),
        "convolution": (lambda *a: conv.short_conv(*a, True), (w[..., 0, :], normal(16, 4), normal(3, 3, 16), offsets)),
        "norm": (lambda x, weight, gate: norm.rms_norm(x, weight, 1e-5, gate), (x, weight, x.cos())),
        "sum and norm": (lambda *a: norm.add_rms_norm(*a, 1e-5, torch.float32), (x, x.cos(), weight)),
        "SwiGLU": (swiglu.swiglu, (x, x.cos())),
        "rotation": (rotary.rotate, (w, normal(1, 20, 8).detach())),
        "loss": (lambda *a: cross_entropy.cross_entropy(*a, -1), (x, integers(3, -1, 15))),
        "attention": (attended, (*heads, torch.rand(4, device=DEVICE, dtype=torch.float64), *ring)),
        "step's SwiGLU": (swiglu.swiglu_of_pair, (x,)),
        "projection": (
            lambda x, norm, added: project.project(x, codes.float(), norm=norm, eps=1e-5, added=added),
            (x[:2], weight, normal(2, 5)),
        ),
        "8 bits": (matvec.multiply, (x, codes, normal(5).abs(), normal(5))),
    }


def in_pieces(x: Tensor) -> Tensor:
    """x with something else between its numbers."""
    return torch.stack([x, 1 - x], dim=-1)[..., 0]


def results(call, inputs, gradients):
    leaves = [x.detach().requires_grad_(gradients and x.is_floating_point()) for x in inputs]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not gradients:
        return outputs
    wanted, grown = ([x for x in some if x.requires_grad] for some in (leaves, outputs))
    return *outputs, *torch.autograd.grad(grown, wanted, [y.cos() for y in grown], allow_unused=True)


@pytest.mark.parametrize("name", calls())
def test_operands_in_pieces_change_nothing(name):
    call, inputs = calls()[name]
    gradients = name not in WITHOUT_GRADIENTS
    expected = results(call, inputs, gradients)
    for n, x in enumerate(inputs):
        found = results(call, [in_pieces(y) if m == n else y for m, y in enumerate(inputs)], gradients)
        for a, b in zip(found, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), f"operand {n}: {list(x.shape)}"


def test_what_is_written_in_place_must_be_contiguous():
    _, inputs = calls()["attention"]
    for n in (4, 5, 6):
        rings = [in_pieces(x) if m == n else x for m, x in enumerate(inputs)]
        with pytest.raises(ValueError, match="expected them contiguous"):
            attend.attend(*rings, 0.3)
