"""The fused norms are held to their formulas in float64; under the interpreter without a GPU."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from operands import assert_close

from gdn2.layers import RMSNorm
from gdn2.ops import fused
from gdn2.ops.kernels import norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative L2. float32: a sum of up to 2,304 squares, a root and a few products (over all rows for the weight). 16 bits:
# each result is rounded once, to 8 bits (bfloat16: within 2^-8, and the interpreter truncates) or to 11.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
EPS = 1e-5


def arguments(shape=(3, 5, 2, 16), dtype=torch.float32, gate_dtype=None, weight_dtype=None):
    torch.manual_seed(0)
    normal = lambda dtype, *s: torch.randn(*s, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()  # noqa: E731
    return normal(dtype, *shape), normal(weight_dtype or dtype, shape[-1]), normal(gate_dtype or dtype, *shape)


def l2_norm(x):
    return norm.l2_norm(x, EPS)


def rms_norm(x, weight):
    return norm.rms_norm(x, weight, EPS)


def gated(x, weight, gate):
    return norm.rms_norm(x, weight, EPS, gate)


FUNCTIONS = {
    l2_norm: lambda x: x / (x.square().sum(-1, keepdim=True) + EPS).sqrt(),
    rms_norm: lambda x, weight: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight,
    gated: lambda x, weight, gate: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight * F.silu(gate),
}


def results(function, leaves):
    y = function(*leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    gradients = torch.autograd.grad(y, leaves, upstream)
    named = {"y": y} | {f"d {n}": g for n, g in zip(("x", "weight", "gate"), gradients)}
    return {n: t.detach().double().cpu() for n, t in named.items()}


def held_to_formula(function, tensors, bound=None):
    leaves = tensors[: function.__code__.co_argcount]
    expected = results(FUNCTIONS[function], [t.detach().double().requires_grad_() for t in leaves])
    assert_close(results(function, leaves), expected, bound or max(BOUNDS[t.dtype] for t in leaves))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(1, 3), (3, 5, 2, 16), (70, 12), (9, 100)], ids=str)
def test_norms_match_their_formulas(function, shape):
    held_to_formula(function, arguments(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_rounded_once(dtype):
    for function in FUNCTIONS:
        held_to_formula(function, arguments(dtype=dtype, weight_dtype=torch.float32))


def test_the_result_has_the_dtype_of_the_gate():
    x, weight, gate = arguments(gate_dtype=torch.bfloat16)
    assert gated(x, weight, gate).dtype == torch.bfloat16
    held_to_formula(gated, (x, weight, gate))


def summed(x, weight, added, dtype=None):
    return norm.add_rms_norm(x, added, weight, EPS, dtype or x.dtype)


@pytest.mark.parametrize(
    ("dtype", "added", "result"),
    [(torch.float32, torch.float32, torch.float32), (torch.float32, torch.bfloat16, torch.bfloat16),
     (torch.bfloat16, torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32, torch.float32)],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 3), (5, 2, 20), (70, 12)], ids=str)
def test_a_sum_and_its_norm_match_their_formulas(dtype, added, result, shape):
    leaves = arguments(shape, dtype, added, torch.float32)
    total, y = summed(*leaves, result)
    assert (total.dtype, y.dtype) == (torch.promote_types(dtype, added), result)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected_total = wide[0] + wide[2]
    expected_y = FUNCTIONS[rms_norm](expected_total, wide[1])
    normal = torch.Generator().manual_seed(1)
    upstream = [torch.randn(shape, generator=normal, dtype=torch.float64).to(t) for t in (total, y)]
    gradients = torch.autograd.grad((total, y), leaves, upstream)
    expected = torch.autograd.grad((expected_total, expected_y), wide, [u.double() for u in upstream])
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
    names = ("x", "weight", "added")
    found = {"total": total, "y": y} | dict(zip(names, gradients))
    right = {"total": expected_total, "y": expected_y} | dict(zip(names, expected))
    # Of two 16-bit summands the sum is rounded before its norm is taken: errors of both.
    bound = 2 * BOUNDS[torch.bfloat16] if torch.bfloat16 in (dtype, added, result) else BOUNDS[dtype]
    assert_close(
        {n: t.detach().double().cpu() for n, t in found.items()}, {n: t.detach().cpu() for n, t in right.items()}, bound
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_fused_sums_and_norms_have_the_dtypes_of_unfused_ones(monkeypatch, around, autocast):
    layer = RMSNorm(16).to(DEVICE)
    for dtype, added in product((torch.float32, torch.bfloat16, torch.float16), repeat=2):
        found = []
        for devices in ((), (DEVICE,)):
            monkeypatch.setattr(fused, "DEVICES", devices)
            with around(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                summands = [torch.ones(2, 16, device=DEVICE, dtype=t) for t in (dtype, added)]
                found.append([t.dtype for t in layer.of_sum(*summands)])
        assert found[0] == found[1], (dtype, added)


def test_a_norm_in_another_dtype_is_rounded_once():
    x, weight, _ = arguments()
    y = norm.rms_norm(x, weight, EPS, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.dtype == torch.float32
    wide = x.detach().double().requires_grad_()
    expected = FUNCTIONS[rms_norm](wide, weight.detach().double())
    (right,) = torch.autograd.grad(expected, wide, torch.ones_like(expected))
    assert_close({"y": y.detach().double()}, {"y": expected.detach()}, BOUNDS[torch.bfloat16])
    assert_close({"dx": dx.double()}, {"dx": right}, BOUNDS[torch.float32])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_zero_rows_and_large_ones_stay_finite(function):
    x, weight, gate = arguments()
    x.data[0] = 0
    x.data[1] *= 1e15
    gate.data[2] *= 1e4
    held_to_formula(function, (x, weight, gate))


def test_no_rows_give_no_rows_and_no_weight_gradient():
    x, weight, gate = arguments((0, 16))
    (gradient,) = torch.autograd.grad(gated(x, weight, gate).sum(), weight)
    assert torch.equal(gradient, torch.zeros_like(weight))


def test_strided_tensors_match_contiguous_ones():
    x, weight, gate = arguments()
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in (x, weight, gate)]
    assert_close(results(gated, strided), results(gated, (x, weight, gate)), 0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_opcheck_passes(function):
    x, weight, gate = arguments((3, 2, 16))
    missing = {l2_norm: (None, None), rms_norm: (weight, None), gated: (weight, gate)}[function]
    torch.library.opcheck(norm._norm.library, (x, *missing, EPS, 1 / 16, x.dtype))


def test_opcheck_passes_with_a_sum():
    x, weight, added = arguments((3, 2, 16), gate_dtype=torch.bfloat16)
    torch.library.opcheck(norm._add_norm.library, (x, added, weight, EPS, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(300, 16, 128), (77, 2304), (501, 100), (33, 256), (5, 16384)], ids=str)
def test_gpu_matches_the_formulas(dtype, shape):
    for function in FUNCTIONS:
        held_to_formula(function, arguments(shape, dtype))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("shape", [(77, 2304), (501, 100)], ids=str)
def test_gpu_sums_match_the_formulas(shape):
    test_a_sum_and_its_norm_match_their_formulas(torch.float32, torch.bfloat16, torch.bfloat16, shape)
    test_a_sum_and_its_norm_match_their_formulas(torch.float32, torch.float32, torch.float32, shape)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_gives_the_same_bits_twice():
    once, twice = (results(gated, arguments((3000, 16, 128), torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.usefixtures("most_of_the_memory")
def test_gpu_reaches_beyond_2_to_the_31_elements():
    """22 GB."""
    end = 10
    x, gate = torch.randn(2, 2**31 // 128 + end, 128, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(128, device=DEVICE)
    y, alone = norm.rms_norm(x, weight, EPS, gate), norm.rms_norm(x[-end:], weight, EPS, gate[-end:])
    assert torch.equal(y[-end:], alone)
    dx, _, dgate = norm._norm_backward(y, x, weight, gate, EPS, 1 / 128)
    alone = norm._norm_backward(y[-end:], x[-end:], weight, gate[-end:], EPS, 1 / 128)
    assert torch.equal(dx[-end:], alone[0])
    assert torch.equal(dgate[-end:], alone[2])
