"""What lies between a step's matrix products is held to float64; under the interpreter without a GPU."""

import pytest
import torch
import torch.nn.functional as F

from gdn2.ops.kernels import between

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Outputs are rounded once (bfloat16: the interpreter truncates), the norm's input as well.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(3, 1, 20), (1, 64), (0, 8)])
def test_sum_and_its_norm(dtype, shape):
    torch.manual_seed(0)
    x, added = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=DEVICE)
    total, y = between.add_rms_norm(x, added, weight, 1e-5)
    expected = x.double() + added.double()
    torch.testing.assert_close(total.double(), expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    normed = F.rms_norm(total.double(), shape[-1:], weight.double(), 1e-5)
    torch.testing.assert_close(y.double(), normed, rtol=BOUNDS[dtype], atol=1e-6)
    assert (total.dtype, y.dtype, y.shape) == (dtype, dtype, x.shape)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "width"), [(2, 48), (1, 5), (0, 4)])
def test_product_of_swiglu(monkeypatch, dtype, rows, width):
    monkeypatch.setattr(between, "BLOCK", 32)
    torch.manual_seed(0)
    both = torch.randn(rows, 1, 2 * width, device=DEVICE).to(dtype)
    gate, up = both.double().chunk(2, dim=-1)
    y = between.swiglu(both)
    torch.testing.assert_close(y.double(), F.silu(gate) * up, rtol=BOUNDS[dtype], atol=1e-6)
    assert (y.dtype, y.shape) == (dtype, (rows, 1, width))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS)
def test_gpu_real_sizes(dtype):
    torch.manual_seed(0)
    test_sum_and_its_norm(dtype, (64, 1, 2_304))
    both = torch.randn(64, 1, 2 * 6_208, device=DEVICE).to(dtype)
    gate, up = both.double().chunk(2, dim=-1)
    torch.testing.assert_close(between.swiglu(both).double(), F.silu(gate) * up, rtol=BOUNDS[dtype], atol=1e-6)
