"""The fused gates are held to their formulas in float64; under the interpreter without a GPU."""

import pytest
import torch
import torch.nn.functional as F
from operands import assert_close, relative

from gdn2.ops.kernels import activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative L2. float32: exponentials to a few 1e-7, and sums over all tokens. 16 bits: each result is rounded once, to 8
# bits (bfloat16: within 2^-8, and the interpreter truncates) or to 11; the gradients read gates so rounded.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("f", "b", "w", "rate", "delta")


def arguments(shape=(2, 19), H=2, K=12, values=20, dtype=torch.float32, size=1.0):
    torch.manual_seed(0)
    normal = lambda dtype, *s: torch.randn(*s, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()  # noqa: E731
    f, b, w = (normal(dtype, *shape, channels) for channels in (H * K, H * K, values))
    for x in (f, b, w):
        x.data *= size
    rate, delta = normal(torch.float32, H), normal(torch.float32, H * K)
    delta.data -= 4  # a step of 0.02, as in a fresh layer
    return f, b, w, rate, delta


def formula(f, b, w, rate, delta, largest):
    pace = rate.exp().repeat_interleave(delta.shape[0] // rate.shape[0])
    return -pace * F.softplus(f + delta, threshold=100), largest * torch.sigmoid(b), torch.sigmoid(w)


def results(function, leaves, largest):
    outputs = function(*leaves, largest)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    named = dict(zip(("log_decay", "erase", "write"), outputs)) | {f"d {n}": g for n, g in zip(NAMES, gradients)}
    return {n: t.detach().double().cpu() for n, t in named.items()}


def held_to_formula(leaves, largest=1.0):
    expected = results(formula, [t.detach().double().requires_grad_() for t in leaves], largest)
    assert_close(results(activation.gates, leaves, largest), expected, BOUNDS[leaves[0].dtype])


@pytest.mark.parametrize("largest", [1.0, 2.0])
@pytest.mark.parametrize(
    ("shape", "H", "K", "values"), [((1, 1), 1, 1, 1), ((2, 19), 2, 12, 20), ((130,), 3, 5, 16)], ids=str
)
def test_gates_match_their_formulas(shape, H, K, values, largest):
    held_to_formula(arguments(shape, H, K, values), largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_rounded_once_and_the_decay_stays_float32(dtype):
    leaves = arguments(dtype=dtype)
    g, erase, write = activation.gates(*leaves, 2.0)
    assert (g.dtype, erase.dtype, write.dtype) == (torch.float32, dtype, dtype)
    assert relative(g, formula(*(t.double() for t in leaves), 2.0)[0]) < BOUNDS[torch.float32]
    held_to_formula(leaves, 2.0)


def test_small_steps_keep_their_relative_precision():
    """softplus of -30 to 30, against log1p in float64."""
    f = torch.linspace(-30, 30, 128, dtype=torch.float32, device=DEVICE).view(-1, 1)
    zero = torch.zeros(1, device=DEVICE)
    g, _, _ = activation.gates(f, f, f, zero, zero, 1.0)
    x = f.double()
    exact = -(x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())))
    # An exponent of 30 is known to 30 * 2^-24 in float32, and the exponential to as much again.
    torch.testing.assert_close(g.double(), exact, rtol=5e-6, atol=0)


def test_saturated_gates_stay_finite():
    f, b, w, rate, delta = arguments(size=300.0)
    outputs = activation.gates(f, b, w, rate, delta, 2.0)
    gradients = torch.autograd.grad([o.sum() for o in outputs], [f, b, w, rate, delta])
    assert all(bool(x.isfinite().all()) for x in (*outputs, *gradients))
    assert outputs[1].max() == 2
    assert 0 <= outputs[1].min() < 1e-30  # twice the least sigmoid, exp(-80)


def test_strided_tensors_match_contiguous_ones():
    leaves = arguments()
    strided = [t.detach().mT.contiguous().mT.requires_grad_() if t.ndim > 1 else t for t in leaves]
    assert_close(results(activation.gates, strided, 1.0), results(activation.gates, leaves, 1.0), 0)


def test_no_tokens_give_parameter_gradients_of_zero():
    f, b, w, rate, delta = arguments((0,))
    g, _, _ = activation.gates(f, b, w, rate, delta, 1.0)
    for gradient in torch.autograd.grad(g.sum(), (rate, delta)):
        assert not gradient.any()


def test_opcheck_passes():
    torch.library.opcheck(activation.gates, (*arguments((2, 3)), 2.0))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("H", "K", "values"), [(16, 128, 2048), (3, 100, 500)])
def test_gpu_matches_the_formulas(H, K, values, dtype):
    held_to_formula(arguments((2, 501), H, K, values, dtype), 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_gives_the_same_bits_twice():
    leaves = arguments((3000,), 16, 128, 2048, torch.bfloat16)
    once, twice = (results(activation.gates, leaves, 2.0) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_reaches_beyond_2_to_the_31_elements():
    """34 GB."""
    tokens, channels, end = 2**31 // 2048 + 10, 2048, 10
    f = torch.randn(tokens, channels, device=DEVICE, dtype=torch.bfloat16)
    last = f[-end:]
    rate, delta = torch.rand(16, device=DEVICE), torch.randn(channels, device=DEVICE)
    outputs, alone = activation.gates(f, f, f, rate, delta, 2.0), activation.gates(last, last, last, rate, delta, 2.0)
    assert all(torch.equal(o[-end:], x) for o, x in zip(outputs, alone))
    gradients = activation._gates_backward(outputs[0], f, f, f, *outputs[1:], rate, delta, 2.0)
    alone = activation._gates_backward(alone[0], last, last, last, *alone[1:], rate, delta, 2.0)
    assert all(torch.equal(g[-end:], x) for g, x in zip(gradients[:3], alone))
