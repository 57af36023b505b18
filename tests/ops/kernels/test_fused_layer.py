"""The layer with everything around the operator fused is the layer; under the interpreter without a GPU."""

import logging

import pytest
import torch
from operands import assert_close

from gdn2.layers import GatedDeltaNet2
from gdn2.ops import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative L2. float32: a few hundred roundings of 2^-24 along the way, and a norm that raises them. bfloat16: a dozen
# roundings to 8 bits (0.2 % each) on the way to an output and twice as many to a gradient.
BOUNDS = {torch.float32: (5e-6, 2e-5), torch.bfloat16: (2e-2, 4e-2)}

# torch's own, where the first matrix product of a process happens to be one of a backward.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))


def random_layer(**keywords):
    torch.manual_seed(0)
    layer = GatedDeltaNet2(
        **({"d_model": 12, "num_heads": 2, "num_value_heads": 4, "key_dim": 6, "value_dim": 5} | keywords)
    )
    for p in layer.parameters():  # the paper's initialisation is so small that errors would hide
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return layer


def results(layer, x, state, cu_seqlens, call=None):
    """Outputs, and the gradients of parameters, x and state; `call` stands in for the layer itself."""
    y, after = (layer if call is None else call)(x, state, cu_seqlens)
    outputs = {"y": y} | after._asdict()
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs.values()]
    leaves = dict(layer.named_parameters()) | {"x": x}
    leaves |= {} if state is None else {f"initial {name}": t for name, t in state._asdict().items()}
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    to_cpu = lambda named: {n: t.detach().double().cpu() for n, t in named.items()}  # noqa: E731
    return to_cpu(outputs), to_cpu({f"d {n}": g for n, g in zip(leaves, gradients)})


def held_to_float64(layer, x, lengths=None, started=False, dtype=torch.float32):
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    batch = x.shape[0] if lengths is None else len(lengths)
    layer, x = layer.to(DEVICE, dtype), x.to(DEVICE, dtype).requires_grad_()
    state = layer.initial_state(batch) if started else None
    if state is not None:
        state = type(state)(*(torch.randn_like(t).requires_grad_() for t in state))
    got = results(layer, x, state, None if cu_seqlens is None else cu_seqlens.to(DEVICE))
    wide = lambda t: t.detach().double().cpu().requires_grad_()  # noqa: E731
    state = None if state is None else type(state)(*map(wide, state))
    expected = results(layer.double().cpu(), wide(x), state, cu_seqlens)
    for a, b, bound in zip(got, expected, BOUNDS[dtype]):
        assert a.keys() == b.keys()
        assert_close(a, b, bound)


@pytest.mark.parametrize("started", [True, False])
def test_layer_matches_float64_with_all_gradients(started):
    held_to_float64(random_layer(), torch.randn(2, 11, 12), started=started)


@pytest.mark.parametrize("started", [True, False])
def test_packed_layer_matches_float64_with_all_gradients(started):
    held_to_float64(random_layer(negative_eigenvalues=True), torch.randn(1, 12, 12), [5, 0, 1, 6], started)


@torch.no_grad()
def test_steps_match_a_whole_sequence():
    layer, x = random_layer().to(DEVICE), torch.randn(2, 5, 12, device=DEVICE)
    y, after = layer(x)
    state, outputs = layer.initial_state(2), []
    for token in x.split(1, dim=1):
        before = [t.clone() for t in state]
        out, following = layer(token, state)
        assert all(torch.equal(a, b) for a, b in zip(before, state))
        outputs.append(out)
        state = following
    assert_close(
        {"y": torch.cat(outputs, dim=1)} | state._asdict(), {"y": y} | after._asdict(), BOUNDS[torch.float32][0]
    )


def test_training_keeps_no_tails():
    layer, x = random_layer().to(DEVICE), torch.randn(2, 5, 12, device=DEVICE)
    y, state = layer(x, output_state=False)
    assert state is None
    assert torch.equal(y, layer(x)[0])


def test_compiled_whole_matches_eager():
    layer, x = random_layer().to(DEVICE), torch.randn(1, 9, 12, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for cu_seqlens in (None, torch.tensor([0, 2, 2, 9], device=DEVICE)):
        (outputs, gradients), (eager_outputs, eager_gradients) = (
            results(layer, x.requires_grad_(), None, cu_seqlens, call) for call in (compiled, layer)
        )
        # The same kernels run in the same order; only the graph around them differs.
        assert_close(outputs | gradients, eager_outputs | eager_gradients, 1e-6)
    with torch.no_grad():
        _, state = compiled(x)
        assert_close({"y": compiled(x[:, :1], state)[0]}, {"y": layer(x[:, :1], state)[0]}, 1e-6)
    torch._dynamo.reset()


def test_the_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_announced", False)
    with caplog.at_level(logging.INFO, "gdn2"):
        assert all(fused.fused(torch.zeros(1)) for _ in range(2))
    assert caplog.messages == ["convolutions and norms on cpu: fused kernels"]


def test_float64_stays_with_torch():
    assert not fused.fused(torch.zeros(1, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS)
def test_gpu_layer_matches_float64_with_all_gradients(dtype):
    layer = random_layer(d_model=256, num_heads=2, num_value_heads=4, key_dim=64, value_dim=128)
    held_to_float64(layer, torch.randn(2, 150, 256), started=True, dtype=dtype)
    held_to_float64(layer, torch.randn(1, 200, 256), [0, 150, 3, 47], dtype=dtype)
