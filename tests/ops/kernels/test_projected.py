"""The kernels that activate what a layer projects are held to the activations and the recurrence in float64."""

import pytest
import torch
import torch.nn.functional as F
from operands import assert_close

from gdn2.ops import rule_from_projections

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative L2. As in test_launch; a norm and an activation add a rounding each, and the gradients along q and k are sums
# over value channels.
BOUNDS = {torch.float32: (5e-6, 2e-5), torch.bfloat16: (6e-3, 1.2e-2), torch.float16: (6e-3, 1.2e-2)}
NAMES = ("q", "k", "v", "decay", "erase", "write", "rate", "delta", "initial_state")


def draw(B=1, T=36, H=1, HV=None, K=16, V=16, N=None, decay="channel", erase="channel", write="channel", size=1.0):
    """The operands in float64, by name; `decay`, `erase` and `write` say whether channels have gates of their own."""
    torch.manual_seed(0)
    HV = HV or H
    normal = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
    width = {"channel": K, "head": 1}
    x = {"q": 3 * normal(B, T, H, K), "k": 0.2 * normal(B, T, H, K), "v": normal(B, T, HV, V)}
    if decay != "none":
        x |= {"decay": size * normal(B, T, H, width[decay]), "rate": normal(H), "delta": normal(H * width[decay]) - 4}
    if erase != "none":
        x["erase"] = size * normal(B, T, H, width[erase])
    if write != "none":
        x["write"] = size * normal(B, T, HV, V if write == "channel" else 1)
    return x | {"initial_state": normal(N or B, HV, K, V)}


def results(x, backend, **options):
    o, state = rule_from_projections(
        *(x.get(name) for name in NAMES[:-1]), initial_state=x["initial_state"], output_final_state=True,
        backend=backend, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in (o, state)]
    gradients = torch.autograd.grad([o, state], list(x.values()), upstream)
    named = {"o": o, "state": state} | {f"d {name}": g for name, g in zip(x, gradients)}
    return {name: t.detach().double().cpu() for name, t in named.items()}


def held_to_float64(x, dtype=torch.float32, cu_seqlens=None, bounds=None, **options):
    kept = ("rate", "delta", "initial_state")
    ours = {n: t.to(DEVICE, torch.float32 if n in kept else dtype).requires_grad_() for n, t in x.items()}
    exact = {n: t.detach().cpu().double().requires_grad_() for n, t in ours.items()}
    expected = results(exact, "reference", cu_seqlens=cu_seqlens, **options)
    got = results(ours, "triton", cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(DEVICE), **options)
    bounds = bounds or BOUNDS[dtype]
    sums = sums_of_terms(exact, expected)
    for outputs, bound in zip((("o", "state"), got.keys() - {"o", "state"} - sums.keys()), bounds):
        assert_close({n: got[n] for n in outputs}, {n: expected[n] for n in outputs}, bound)
    errors = {n: ((got[n] - expected[n]).norm() / sums[n].norm()).item() for n in sums}
    assert all(error <= bounds[1] for error in errors.values()), errors


def sums_of_terms(x, expected):
    """d rate and d delta with the magnitude of every term: over many tokens they cancel, and errors do not."""
    if "d decay" not in expected:
        return {}
    d = expected["d decay"].abs()
    shifted = (x["decay"].detach() + x["delta"].detach().view(d.shape[2:])).clamp(min=-30.0)  # the ratio is 1 there
    rate = d * (F.softplus(shifted) / shifted.sigmoid())
    return {"d delta": d.sum((0, 1)).flatten(), "d rate": rate.sum((0, 1, 3))}


@pytest.mark.parametrize("largest", [1.0, 2.0])
@pytest.mark.parametrize("shape", [{"T": 1}, {"B": 2, "T": 20, "H": 2, "K": 12, "V": 20}, {"HV": 3, "K": 40}], ids=str)
def test_projections_match_float64_with_all_gradients(shape, largest):
    held_to_float64(draw(**shape), largest_erase=largest, largest_write=largest)


@pytest.mark.parametrize(("decay", "erase"), [("channel", "head"), ("head", "head"), ("none", "head")])
def test_projections_of_the_other_rules_match_float64(decay, erase):
    held_to_float64(draw(H=2, K=24, decay=decay, erase=erase, write="head"))


@pytest.mark.parametrize(("erase", "write"), [("none", "channel"), ("none", "none"), ("channel", "none")])
def test_projections_without_gates_match_float64(erase, write):
    held_to_float64(draw(T=20, HV=2, erase=erase, write=write), largest_erase=2.0, largest_write=2.0)


def test_packed_projections_match_float64():
    held_to_float64(draw(T=40, HV=2, N=4), cu_seqlens=torch.tensor([0, 17, 17, 39, 40]))


def test_extreme_projections_match_float64():
    """Gates at both ends of their range, and decays from none to hundreds of nats a token."""
    held_to_float64(draw(size=100.0), bounds=(5e-6, 1e-4))  # d rate is 100 times what is rounded


def test_a_zero_vector_has_finite_gradients():
    x = draw()
    x["q"][:, 3] = x["k"][:, 5] = 0
    held_to_float64(x)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "shape",
    [
        {"T": 200, "H": 2, "K": 128, "V": 128},
        {"T": 150, "H": 2, "HV": 4, "K": 60, "V": 100, "size": 30.0},
        {"T": 150, "H": 2, "K": 128, "V": 128, "decay": "head", "erase": "head", "write": "head"},
        {"T": 100, "H": 1, "K": 256, "V": 256},
    ],
    ids=str,
)
def test_gpu_projections_match_float64(shape, dtype):
    # The gradient of a scalar gate is a sum over 128 channels that cancels; d rate multiplies the rounding of gradients
    # of which a decay by 30 nats leaves nothing with those 30.
    factor = 6 if "size" in shape else 2 if "decay" in shape else 1
    bounds = (BOUNDS[dtype][0], factor * BOUNDS[dtype][1])
    held_to_float64(draw(**shape), dtype, bounds=bounds)
