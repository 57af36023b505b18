"""Linears of 8-bit weights compute what their rounded weights say, everywhere alike; a model keeps its gates."""

import pytest
import torch
from small import MODELS, prompt, small_model
from torch import nn

from gdn2.generate import generate
from gdn2.layers.quantized import LARGEST, QuantizedLinear
from gdn2.ops import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = list(LARGEST)
# Relative L2 of a product in each dtype: sums of 70 terms; outputs, and in 16 bits the products of code and scale,
# rounded (bfloat16: the interpreter truncates).
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def linear(out=9, inputs=70, bias=False):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, out, bias=bias)
    layer.weight.data *= torch.logspace(-1, 1, out)[:, None]  # scales must be each output's own
    return layer


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_to_the_nearest_code(kind):
    layer = linear()
    layer.weight.data[3] = 0
    narrow, weight = QuantizedLinear(layer, kind), layer.weight.detach()
    off = (narrow.weight - weight).abs()
    scale = narrow.scale[:, None]
    # Half a step: of one code's distance in int8; of 2^-3 of the number in e4m3, below 2^-6 of 2^-9.
    step = scale if kind == "int8" else torch.maximum(weight.abs() / 8, scale * 2**-9)
    assert bool((off <= step / 2 * (1 + 1e-5)).all())
    assert not narrow.weight[3].any()
    largest = narrow.values.float().abs().amax(1)
    assert bool((largest[[0, 1, 2, 4]] > 0.98 * LARGEST[kind]).all())
    assert narrow.codes.nbytes == weight.numel()


def check_product(narrow, y, x):
    """y is the product of x, as it is, with the rounded weights: to the error of sums as large as the terms in them."""
    x, weight = x.detach().double().cpu(), narrow.weight.double().cpu()
    bias = torch.zeros(len(weight)).double() if narrow.bias is None else narrow.bias.detach().double().cpu()
    off = (y.detach().double().cpu() - (x @ weight.T + bias)).abs()
    size = x.norm(dim=-1, keepdim=True) * weight.norm(dim=1) + bias.abs()
    assert bool((off <= BOUNDS[y.dtype] * size).all())


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_product_is_that_of_the_rounded_weights(kind, dtype, bias):
    narrow, x = QuantizedLinear(linear(bias=bias), kind), torch.randn(2, 5, 70).to(dtype)
    y = narrow(x)
    assert (y.dtype, y.shape) == (dtype, (2, 5, 9))
    check_product(narrow, y, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_kernel_is_the_same_product(monkeypatch, kind, dtype, rows):
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    narrow = QuantizedLinear(linear(out=6, bias=rows == 3), kind).to(DEVICE)
    x = torch.randn(rows, 70, device=DEVICE).to(dtype)
    check_product(narrow, narrow(x), x)


def test_kernel_takes_no_rows_and_inputs_of_several_tiles(monkeypatch):
    from gdn2.ops.kernels import matvec

    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    monkeypatch.setattr(matvec, "INPUTS", 16)
    narrow = QuantizedLinear(linear(), "int8").to(DEVICE)
    x = torch.randn(2, 70, device=DEVICE)
    assert error(narrow(x), x @ narrow.weight.T) < BOUNDS[torch.float32]
    assert narrow(x[:0]).shape == (0, 9)


def test_gradients_of_the_input_leave_the_kernel(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    narrow, x = QuantizedLinear(linear(), "int8").to(DEVICE), torch.randn(2, 70, device=DEVICE, requires_grad=True)
    narrow(x).sum().backward()
    torch.testing.assert_close(x.grad, narrow.weight.sum(0).expand(2, -1))


def test_many_rows_leave_the_kernel(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    narrow, x = QuantizedLinear(linear(), "int8").to(DEVICE), torch.randn(40, 70, device=DEVICE)
    assert error(narrow(x), x @ narrow.weight.T) < BOUNDS[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_casts_leave_codes_and_scales_alone(kind):
    narrow = QuantizedLinear(linear(bias=True), kind)
    codes, scale = narrow.codes.clone(), narrow.scale.clone()
    narrow.to(torch.bfloat16).half()
    assert torch.equal(narrow.codes, codes)
    assert torch.equal(narrow.scale, scale)
    assert narrow.scale.dtype == torch.float32
    assert narrow.bias.dtype == narrow.weight.dtype == torch.float16


def test_autocast_decides_the_dtype_as_for_a_linear():
    narrow, x = QuantizedLinear(linear(), "int8"), torch.randn(3, 70)
    with torch.autocast("cpu", torch.bfloat16):
        assert narrow(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_model_keeps_everything_but_its_large_matrices(name, kind):
    changes = {"tie_embeddings": True} if name == "tied" else MODELS[name]
    model, whole = small_model(**changes).quantize(kind), small_model(**changes)
    narrow = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    kept = dict(model.named_parameters())
    expected = {n.removesuffix(".weight") for n, _ in whole.named_parameters()} - {
        n.removesuffix(".weight") for n in kept
    }
    assert expected == set(narrow)
    ends = {n.rsplit(".", 1)[-1] for n in narrow}
    assert (
        {"gate", "up", "down", "out_proj"}
        <= ends
        <= {"gate", "up", "down", "q_proj", "k_proj", "v_proj", "out_proj", "head"}
    )
    assert ("head" in ends) == (name != "tied")
    assert not any("gates" in n or "output_gate" in n or "norm" in n for n in narrow)
    for n, parameter in kept.items():
        assert torch.equal(parameter, whole.get_parameter(n))
    tokens = torch.tensor([prompt(40)])
    with torch.inference_mode():
        off = error(model.logits(model(tokens)[0]), whole.logits(whole(tokens)[0]))
    assert 0 < off < (0.1 if kind == "int8" else 0.4)  # the weights' own error, some 0.8 % and 2.6 %, over two blocks
    assert len(list(generate(model, [prompt(5)], 8, temperature=0))) <= 8
    assert model.quantize(kind) is model  # nothing is left to do


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="kind is 'int4'; expected one of int8, fp8"):
        small_model().quantize("int4")
    layer = linear()
    layer.weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match="a weight is not finite"):
        QuantizedLinear(layer, "int8")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16, 17])
def test_gpu_product_of_real_sizes(kind, dtype, rows):
    torch.manual_seed(0)
    narrow = QuantizedLinear(nn.Linear(6_208, 2_304, bias=False), kind).to("cuda")
    x = torch.randn(rows, 6_208, device="cuda").to(dtype)
    check_product(narrow, narrow(x), x)
