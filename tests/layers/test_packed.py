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
    assert packed.holds(layers)
    twin, twins = copy.deepcopy((packed, layers))
    assert not twin.holds(twins)
    assert not packed.holds([*layers[:2], nn.Linear(6, 1, bias=False).double()])  # another module
    assert not packed.holds(layers[:2])
    layers[2].to(torch.bfloat16)
    assert not packed.holds(layers)


def test_only_alike_linears_can_be_packed():
    layers = linears()
    assert Packed.possible(layers)
    assert not Packed.possible([*layers, nn.Linear(6, 2, bias=True).double()])
    assert not Packed.possible([*layers, nn.Linear(7, 2, bias=False).double()])
    assert not Packed.possible([*layers, nn.Linear(6, 2, bias=False)])
    assert not Packed.possible([*layers, nn.Identity()])


def is_packed(module):
    return module._packed is not None and module._packed.holds(module._reads())


def test_quantizing_a_packed_model_undoes_it(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    monkeypatch.setattr(matvec, "OUTPUTS", 64)
    fresh = small_model().to(DEVICE).quantize("int8")
    model = small_model().to(DEVICE)
    DecodeStep(model, 1, graph=False)
    model.pack()
    model.quantize("int8")
    assert model.blocks[0].mlp._packed is None
    model.pack()
    torch.testing.assert_close(DecodeStep(model, 1, graph=False)([5]), DecodeStep(fresh, 1, graph=False)([5]))


def test_a_linear_in_the_place_of_a_packed_one_is_used(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    model, plain = small_model().to(DEVICE), small_model().to(DEVICE)
    model.pack()
    for one in (model, plain):
        torch.manual_seed(9)
        gate = one.blocks[0].mlp.gate
        one.blocks[0].mlp.gate = nn.Linear(gate.in_features, gate.out_features, bias=False).to(DEVICE)
    step, wide = DecodeStep(model, 1, graph=False), DecodeStep(plain.double(), 1, graph=False)
    torch.testing.assert_close(step([5]).double(), wide([5]), atol=1e-4, rtol=1e-4)


def test_steps_of_other_shapes_are_refused():
    model = small_model()
    step = DecodeStep(model, 2, graph=False)
    for tokens in ([1], [1, 2, 3], torch.tensor([1]), torch.tensor([1.0, 2.0]), torch.tensor([[1, 2]])):
        with pytest.raises(ValueError, match="expected"):
            step(tokens)
    state = model.initial_state(1)
    with pytest.raises(ValueError, match=r"tokens have shape \[1, 2\]; expected \[N, 1\]"):
        model.step(torch.tensor([[1, 2]]), state)
    with pytest.raises(ValueError, match="state has 1 entries; expected one for each of 2 blocks"):
        model.step(torch.tensor([[1]]), state[:1])


@pytest.mark.parametrize("name", ["gdn2", "window", "int8"])
def test_packed_model_steps_with_fused_kernels_as_it_did(monkeypatch, tmp_path, name):
    model = small_model(**MODELS.get(name, {})).to(DEVICE)
    if name == "int8":
        model.quantize("int8")
    plain, weights = copy.deepcopy(model).double(), copy.deepcopy(model.state_dict())
    model.pack()
    if name != "int8":
        assert is_packed(model.blocks[0].mlp)
        assert name != "gdn2" or is_packed(model.blocks[0].mixer)
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
    assert is_packed(model.blocks[0].mlp)


def test_casting_a_packed_model_undoes_it(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    model = small_model().to(DEVICE)
    model.pack()
    model.bfloat16()
    assert model.blocks[0].mixer._packed is None  # nor is the old matrix held
    fresh = small_model().to(DEVICE).bfloat16()
    assert torch.equal(DecodeStep(model, 1, graph=False)([5]), DecodeStep(fresh, 1, graph=False)([5]))
