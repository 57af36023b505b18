"""A step's products, with what stands before and after, are held to float64; under the interpreter without a GPU."""

import pytest
import torch
import torch.nn.functional as F

from gdn2.ops.kernels import early, project

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Outputs are rounded once (bfloat16: the interpreter truncates); float32: sums of up to 2,304 products.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def operand(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


def hold(rows, inputs, outputs, dtype, norm=False, added=False, swiglu=False, wanted=None):
    torch.manual_seed(0)
    x, weight = operand(rows, 1, inputs, dtype=dtype), operand((1 + swiglu) * outputs, inputs, dtype=dtype)
    weight = weight * inputs**-0.5
    given = {
        "norm": operand(inputs, dtype=dtype) if norm else None,
        "added": operand(rows, 1, outputs, dtype=dtype) if added else None,
    }
    assert project.fits(x, weight)
    y = project.project(x, weight, **given, eps=1e-5, swiglu=swiglu, dtype=wanted)
    h = F.rms_norm(x.double(), (inputs,), given["norm"].double(), 1e-5) if norm else x.double()
    expected = F.linear(h, weight.double())
    if swiglu:
        gate, up = expected.chunk(2, dim=-1)
        expected = F.silu(gate) * up
    if added:
        expected = expected + given["added"].double()
    assert (y.dtype, y.shape) == (wanted or dtype, (rows, 1, outputs))
    bound = BOUNDS[y.dtype]
    torch.testing.assert_close(y.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [1, 2])
def test_product_of_a_norm_and_the_residual_sum(rows, dtype):
    hold(rows, 40, 13, dtype, norm=True, added=True)  # neither fills its tiles


@pytest.mark.parametrize("dtype", BOUNDS)
def test_swiglu_of_a_norm(dtype):
    hold(2, 48, 10, dtype, norm=True, swiglu=True)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_wider_output(rows):
    hold(rows, 16, 8, torch.bfloat16, wanted=torch.float32)


def test_rows_of_several_tiles_two_at_a_time(monkeypatch):
    monkeypatch.setattr(project, "MANY_OUTPUTS", 20)
    hold(1, 600, 21, torch.bfloat16, norm=True, added=True)
    hold(2, 300, 23, torch.float32, norm=True)


def test_wide_rows_lie_in_two_warps():
    hold(1, 5_000, 5, torch.bfloat16, added=True)


def test_an_input_of_zeros_stays_zeros():
    x, weight = torch.zeros(1, 16, device=DEVICE), torch.randn(4, 16, device=DEVICE)
    assert not project.project(x, weight, norm=torch.ones(16, device=DEVICE), eps=1e-5).any()


def test_what_is_broken_stays_broken():
    x, weight = torch.ones(2, 16, device=DEVICE), torch.ones(5, 16, device=DEVICE)
    x[0, 3] = float("nan")
    y = project.project(x, weight, norm=torch.ones(16, device=DEVICE), eps=1e-5)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_what_does_not_fit():
    x, weight = torch.zeros(2, 1, 8, dtype=torch.bfloat16), torch.zeros(3, 8, dtype=torch.bfloat16)
    assert project.fits(x, weight)
    assert not project.fits(torch.zeros(3, 1, 8, dtype=torch.bfloat16), weight)
    assert not project.fits(x[:0], weight)
    assert not project.fits(x.float(), weight)
    assert not project.fits(x, torch.zeros(8, 3, dtype=torch.bfloat16).mT)
    assert not project.fits(torch.zeros(1, 8_200, dtype=torch.bfloat16), torch.zeros(3, 8_200, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_gpu_real_sizes(rows, dtype):
    hold(rows, 2_304, 10_496, dtype, norm=True)
    hold(rows, 2_048, 2_304, dtype, added=True)
    hold(rows, 2_304, 6_208, dtype, norm=True, swiglu=True)
    if dtype != torch.float32:  # too wide
        hold(rows, 6_208, 2_304, dtype, added=True)
    hold(rows, 2_304, 32_000, dtype, wanted=torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_kernels_that_begin_early_wait_for_what_they_read(monkeypatch):
    """A chain of products, each of the one before, whose outputs take each other's places; from a graph and without."""
    torch.manual_seed(0)
    weights = [operand(2_048, 2_048, dtype=torch.bfloat16) * 2_048**-0.5 for _ in range(8)]
    x, inputs = operand(1, 2_048, dtype=torch.bfloat16), [operand(1, 2_048, dtype=torch.bfloat16) for _ in range(3)]
    ones = torch.ones(2_048, dtype=torch.bfloat16, device=DEVICE)

    def chain():
        y = x
        for weight in weights * 4:
            y = project.project(y, weight, norm=ones, eps=1e-5)
        return y

    def of_all(call):
        results = []
        for value in inputs * 20:
            x.copy_(value)
            results.append(call().clone())
        return torch.cat(results)

    with monkeypatch.context() as patch:
        patch.setattr(early, "NEXT", 0)
        expected = of_all(chain)
    assert torch.equal(of_all(chain), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()

    def replayed():
        graph.replay()
        return y

    assert torch.equal(of_all(replayed), expected)
