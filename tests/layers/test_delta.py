from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn2.layers import DeltaState, GatedDeltaNet2


def random_layer(*args: Any, **keywords: Any) -> GatedDeltaNet2:
    """The paper's initialisation is so small that errors would hide."""
    torch.manual_seed(0)
    layer = GatedDeltaNet2(*args, **keywords)
    for p in layer.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return layer


@pytest.mark.parametrize("ablated", [("erase",), ("write",), ("erase", "write")])
def test_ablated_gate_erases_and_writes_with_its_mean(ablated: tuple[str, ...]) -> None:
    """Table 5: handing the layer's operator the mean over a head's channels, broadcast, gives the ablated layer."""
    sizes: dict[str, Any] = {"d_model": 8, "num_heads": 2, "num_value_heads": 4, "key_dim": 3, "value_dim": 5}
    options = {f"channel_{name}": name not in ablated for name in ("erase", "write")}
    layer, whole = random_layer(**sizes, **options).double(), random_layer(**sizes).double()
    forward = whole.gates.forward

    def averaged(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_decay, erase, write = forward(x)
        means = {"erase": erase.mean(-1, keepdim=True), "write": write.mean(-1, keepdim=True)}
        erase = means["erase"].expand_as(erase) if "erase" in ablated else erase
        return log_decay, erase, means["write"].expand_as(write) if "write" in ablated else write

    whole.gates.forward = averaged  # type: ignore[method-assign]
    whole.gates.plain = False  # so that the layer asks its gates, not their projections
    x = torch.randn(2, 70, 8, dtype=torch.float64, requires_grad=True)
    got, expected = layer(x)[0], whole(x)[0]
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)  # float64, reordered sums
    weights = torch.randn_like(got)
    parts = [(y * weights).sum() for y in (got, expected)]
    gradients = [torch.autograd.grad(p, [x, *m.parameters()]) for p, m in zip(parts, (layer, whole))]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_zeros_in_front_leave_no_trace() -> None:
    """Left padding, its inputs zeroed, is exact: without biases such a token neither erases nor writes."""
    layer = random_layer(8, 2, key_dim=4, value_dim=4).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    y, state = layer(x)
    padded, padded_state = layer(torch.cat([x.new_zeros(2, 5, 8), x], dim=1))
    torch.testing.assert_close(padded[:, 5:], y, rtol=1e-11, atol=1e-11)  # as above
    for a, b in zip(padded_state, state):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_layer_in_bfloat16_and_under_autocast(training: bool) -> None:
    layer = random_layer(32, 2, key_dim=16, value_dim=16).train(training)
    x = torch.randn(2, 20, 32)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast, state = layer(x, layer.initial_state(2))
        continued, _ = layer(x, state)
    narrow = deepcopy(layer).bfloat16()
    narrowed, narrow_state = narrow(x.bfloat16())
    assert cast.dtype == continued.dtype == narrowed.dtype == state.conv_q.dtype == torch.bfloat16
    assert state.memory.dtype == narrow_state.memory.dtype == torch.float32
    for y in (cast, narrowed):
        # A dozen roundings to 8 bits (0.4 % each) along the way, on outputs of size 1 before the last projection.
        assert (y.float() - exact).norm() < 0.03 * exact.norm()
    cast.float().square().mean().backward()
    narrowed.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for m in (layer, narrow) for p in m.parameters())


def test_training_and_evaluation_modes_agree() -> None:
    layer, x = GatedDeltaNet2(8, 2, key_dim=4, value_dim=4), torch.randn(1, 5, 8)
    assert torch.equal(layer.train()(x)[0], layer.eval()(x)[0])


def test_state_shapes_and_dtypes() -> None:
    layer = GatedDeltaNet2(8, 2, 4, key_dim=3, value_dim=5, conv_width=3)
    state = layer.initial_state(6, dtype=torch.bfloat16)
    assert [list(t.shape) for t in state] == [[6, 2, 6], [6, 2, 6], [6, 2, 20], [6, 4, 3, 5]]
    assert [t.dtype for t in state] == [torch.bfloat16] * 3 + [torch.float32]
    assert isinstance(layer(torch.randn(6, 1, 8))[1], DeltaState)
    assert layer(torch.randn(6, 1, 8), output_state=False)[1] is None
    assert layer.initial_state(1, device="meta").memory.device.type == "meta"


def test_convolutions_start_uniform_within_half() -> None:
    torch.manual_seed(0)
    layer = GatedDeltaNet2(8, 16, key_dim=64, value_dim=64)
    for weight in (layer.conv_q, layer.conv_k, layer.conv_v):
        assert 0.49 < weight.abs().max() <= 0.5
        assert abs(weight.mean()) < 0.02  # 4,096 draws: the mean is known to 0.0045


def test_whole_graph_compiles() -> None:
    torch.manual_seed(0)
    layer, x = GatedDeltaNet2(8, 2, key_dim=4, value_dim=4), torch.randn(1, 9, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for cu_seqlens in (None, torch.tensor([0, 2, 2, 9])):
        y, state = compiled(x, None, cu_seqlens)
        expected, expected_state = layer(x, None, cu_seqlens)
        # The same operations, possibly fused: float32 rounding of outputs near 0.01.
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state.memory, expected_state.memory, rtol=1e-5, atol=1e-7)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_value_heads": 3}, r"num_value_heads is 3; expected a multiple of num_heads \(2\)"),
        ({"key_dim": 0}, "key_dim is 0; expected at least 1"),
        ({"conv_width": 0}, "conv_width is 0; expected at least 1"),
        ({"num_heads": 0}, "num_heads is 0; expected at least 1"),
    ],
)
def test_bad_sizes_are_named(keywords: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet2(**{"d_model": 8, "num_heads": 2, **keywords})


def test_a_state_of_another_batch_is_refused() -> None:
    layer = GatedDeltaNet2(8, 2, key_dim=4, value_dim=4)
    with pytest.raises(ValueError, match=r"tail has shape \[3, 3, 8\]; expected \[2, 3, 8\]"):
        layer(torch.zeros(2, 4, 8), layer.initial_state(3))
