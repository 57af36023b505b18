"""The fused step of attention is held to the layer's torch path in float64; under the interpreter without a GPU."""

import copy

import pytest
import torch

from gdn2.layers import SlidingWindowAttention
from gdn2.layers.attention import _grown
from gdn2.ops import fused
from gdn2.ops.kernels import attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest error of outputs of size 1. float32: sums of a few dozen products, angles in float32; 16 bits: q, k, v and o
# are rounded, and the projections around them.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 6e-3}


def hold(monkeypatch, window, read, dtype=torch.float32, N=2, heads=2, D=8, room=None, **rope):
    """Steps after `read` tokens, of rows at different positions, by the kernel and in float64."""
    torch.manual_seed(0)
    layer = SlidingWindowAttention(heads * D, heads, window, **rope).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    layer.to(dtype).double()  # weights that both have
    narrow = copy.deepcopy(layer).to(DEVICE, dtype)
    x = torch.randn(N, read + 3, heads * D, dtype=torch.float64).to(dtype).double()
    with torch.no_grad():
        _, state = layer(x[:, :read])
        if room is not None:
            state = _grown(state, room)
        state = type(state)(*(t.to(dtype).double() if t.is_floating_point() else t.clone() for t in state))
        state.position[0] += 1 if window is not None and read > window else 0  # another place in its ring
        own = type(state)(*(t.to(DEVICE, dtype if t.is_floating_point() else t.dtype).clone() for t in state))
        for t in range(read, read + 3):
            monkeypatch.setattr(fused, "DEVICES", ())
            expected = layer.step(x[:, t : t + 1], state)
            monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
            y = narrow.step(x[:, t : t + 1].to(DEVICE, dtype), own)
            torch.testing.assert_close(y.double().cpu(), expected, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])
            for a, b in zip(own, state):
                torch.testing.assert_close(a.double().cpu(), b.double(), atol=BOUNDS[dtype], rtol=BOUNDS[dtype])


@pytest.mark.parametrize(("window", "read"), [(1, 2), (5, 2), (5, 5), (5, 13), (20, 30)])
def test_step_matches_the_layer_in_its_window(monkeypatch, window, read):
    monkeypatch.setattr(attend, "TILE", 16)
    hold(monkeypatch, window, read)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_step_matches_the_layer_in_16_bits(monkeypatch, dtype):
    monkeypatch.setattr(attend, "TILE", 16)
    hold(monkeypatch, 20, 30, dtype)


def test_step_matches_the_layer_with_room_to_grow_and_many_tiles(monkeypatch):
    monkeypatch.setattr(attend, "TILE", 2)  # more tiles than are joined at a time, the last of them empty
    hold(monkeypatch, None, 70, room=90, N=1, heads=1, D=4)


def test_step_matches_the_layer_with_scaled_rotations_and_odd_heads(monkeypatch):
    monkeypatch.setattr(attend, "TILE", 16)
    hold(monkeypatch, 5, 7, heads=3, D=6, rope_scaling="yarn", rope_factor=4.0, rope_length=8)


def test_rotation_is_right_at_a_million_tokens(monkeypatch):
    monkeypatch.setattr(attend, "TILE", 16)
    torch.manual_seed(0)
    layer = SlidingWindowAttention(8, 1, 4).to(DEVICE)
    state = layer.initial_state(1)
    state.position.fill_(1_000_003)
    wide, far = copy.deepcopy(layer).double(), type(state)(*(t.clone() for t in state))
    far = far._replace(keys=far.keys.double(), values=far.values.double())
    x = torch.randn(1, 1, 8, device=DEVICE)
    with torch.no_grad():
        monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
        layer.step(x, state)
        monkeypatch.setattr(fused, "DEVICES", ())
        wide.step(x.double(), far)
    torch.testing.assert_close(state.keys.double(), far.keys, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("window", "read", "room"), [(2_048, 100, None), (2_048, 3_000, None), (None, 500, 700)])
def test_gpu_step_of_real_sizes(monkeypatch, dtype, window, read, room):
    hold(monkeypatch, window, read, dtype, N=3, heads=18, D=128, room=room)
