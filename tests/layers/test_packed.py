"""Linears that are packed say what they said, follow their parameters, and come apart again without harm."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import MODELS, prompt, small_model
from torch import nn

from gdn2.decoding import DecodeStep
from gdn2.layers.packed import Packed
from gdn2.ops import fused
from gdn2.ops.kernels import matvec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def linears():
    torch.manual_seed(0)
    return [nn.Linear(6, n, bias=False).double() for n in (3, 5, 1)]


def test_one_product_is_all_of_theirs():
    layers, x = linears(), torch.randn(2, 4, 6, dtype=torch.float64)
    expected = [layer(x) for layer in layers]
    packed = Packed(layers)
    for a, b, layer in zip(packed(x), expected, layers):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(layer(x), b)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1  # nothing is held twice
    with torch.no_grad():
        layers[1].weight.mul_(2)
    torch.testing.assert_close(packed(x)[1], 2 * expected[1])
    layers[0](x).sum().backward()  # and they still train
    assert layers[0].weight.grad.shape == (3, 6)


def test_another_tensor_ends_it():
    layers = linears()
    packed = Packed(layers)
    assert packed.valid
    assert not copy.deepcopy(packed).valid
    layers[2].to(torch.bfloat16)
    assert not packed.valid


def test_only_alike_linears_can_be_packed():
    layers = linears()
    assert Packed.possible(layers)
    assert not Packed.possible([*layers, nn.Linear(6, 2, bias=True).double()])
    assert not Packed.possible([*layers, nn.Linear(7, 2, bias=False).double()])
    assert not Packed.possible([*layers, nn.Linear(6, 2, bias=False)])
    assert not Packed.possible([*layers, nn.Identity()])


@pytest.mark.parametrize("name", ["gdn2", "window", "int8"])
def test_packed_model_steps_with_fused_kernels_as_it_did(monkeypatch, tmp_path, name):
    model = small_model(**MODELS.get(name, {})).to(DEVICE)
    if name == "int8":
        model.quantize("int8")
    plain, weights = copy.deepcopy(model).double(), copy.deepcopy(model.state_dict())
    model.pack()
    if name != "int8":
        assert model.blocks[0].mlp._packed.valid
        assert name != "gdn2" or model.blocks[0].mixer._packed.valid
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, weights[n].cpu()) for n, tensor in load_file(tmp_path / "model.safetensors").items())
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    monkeypatch.setattr(matvec, "OUTPUTS", 64)  # fewer programs for the interpreter
    step, wide, reads = DecodeStep(model, 2, graph=False), DecodeStep(plain, 2, graph=False), prompt(2)
    for token in reads:
        # float32 against float64, over two blocks and two tokens of feedback
        torch.testing.assert_close(step([token, 7]).double(), wide([token, 7]), atol=1e-4, rtol=1e-4)


def test_packing_again_moves_nothing():
    model = small_model()
    model.pack()
    before = [p.data_ptr() for p in model.parameters()]
    model.pack()  # a second step of the model: a graph of the first reads the weights where they are
    assert [p.data_ptr() for p in model.parameters()] == before
    model.double().pack()
    assert model.blocks[0].mlp._packed.valid


def test_casting_a_packed_model_undoes_it(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    model = small_model().to(DEVICE)
    model.pack()
    model.bfloat16()
    assert not model.blocks[0].mixer._packed.valid
    fresh = small_model().to(DEVICE).bfloat16()
    assert torch.equal(DecodeStep(model, 1, graph=False)([5]), DecodeStep(fresh, 1, graph=False)([5]))
