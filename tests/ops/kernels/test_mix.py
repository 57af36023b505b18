"""The mixer of a step for few sequences is held to the kernels of any number; under the interpreter without a GPU."""

import pytest
import torch
from operands import assert_close

from gdn2.ops.kernels import decode, mix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative L2. float32: sums of a few hundred products. 16 bits: y is rounded once, and the interpreter truncates; what
# it is held to is computed from the same numbers.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}


def operands(N=2, H=2, K=16, V=16, R=8, width=4, dtype=torch.float32, memory=torch.float32):
    torch.manual_seed(0)
    normal = lambda *s, to=dtype: torch.randn(s, device=DEVICE).to(to)  # noqa: E731
    keys, values = H * K, H * V
    x = normal(N, 3 * keys + 2 * values + 2 * R)
    low = mix.LowRank(normal(keys, R), normal(values, R), normal(values))
    taps = [normal(n, width) for n in (keys, keys, values)]
    weights = decode.Weights(*taps, normal(H, to=torch.float32), normal(keys, to=torch.float32), normal(V))
    tails = [normal(N, width - 1, n) for n in (keys, keys, values)]
    pool = decode.State(*tails, normal(N, H, K, V, to=memory))
    return x, low, weights, pool


OPTIONS = {"scale": 0.3, "largest_erase": 2.0, "norm_eps": 1e-4}


def hold(**changes):
    """Beside `decode` in float32, which its own tests hold to float64."""
    x, low, weights, pool = operands(**changes)
    H, V = weights.rate.shape[0], weights.norm.shape[0]
    keys, values, R = low.f.shape[0], H * V, low.f.shape[1]
    wide = x.float()
    q, k, v, b, w, low_f, low_gate = wide.split((keys, keys, values, keys, values, R, R), dim=1)
    f = (low_f.double() @ low.f.double().T).float()
    gate = (low_gate.double() @ low.gate.double().T + low.bias.double()).float()
    before = decode.State(*(t.float() for t in pool))
    y, after = decode.decode(
        decode.Token(q, k, v, f, b, w, gate), decode.Weights(*(t.float() for t in weights)), before, **OPTIONS
    )
    assert mix.fits(pool, low)
    got = mix.mix(x, low, weights, pool, **OPTIONS)
    assert (got.dtype, got.shape) == (x.dtype, (x.shape[0], values))
    assert_close({"y": got.float()}, {"y": y}, BOUNDS[x.dtype])
    assert_close({"memory": pool.memory.float()}, {"memory": after.memory}, BOUNDS[pool.memory.dtype])
    for own, tail in zip(pool[:3], after[:3]):
        assert torch.equal(own.float(), tail)


@pytest.mark.parametrize(("H", "K", "V", "R"), [(1, 1, 3, 1), (2, 16, 16, 8), (3, 12, 20, 5)])
def test_any_heads(H, K, V, R):
    hold(N=3, H=H, K=K, V=V, R=R)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_any_width(width):
    hold(width=width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype):
    hold(dtype=dtype)


def test_memory_in_16_bits():
    hold(memory=torch.bfloat16)


def test_what_does_not_fit():
    _, low, _, pool = operands()
    assert not mix.fits(pool._replace(memory=torch.zeros(2, 4, 16, 16)), low)  # grouped value heads
    assert not mix.fits(pool._replace(memory=torch.zeros(2, 2, 16, 2_048)), low)
    assert not mix.fits(pool, low._replace(f=torch.zeros(32, 2_048)))


def test_bad_arguments_are_named():
    x, low, weights, pool = operands()
    with pytest.raises(ValueError, match=r"x has shape \[2, 175\]; expected \[2, 176\]"):
        mix.mix(x[:, 1:], low, weights, pool, **OPTIONS)
    with pytest.raises(ValueError, match=r"bias has shape \[31\]; expected \[32\]"):
        mix.mix(x, low._replace(bias=low.bias[1:]), weights, pool, **OPTIONS)
    with pytest.raises(ValueError, match=r"memory has shape \[1, 2, 16, 16\]; expected \[2, 2, 16, 16\]"):
        mix.mix(x, low, weights, pool._replace(memory=pool.memory[1:]), **OPTIONS)
    with pytest.raises(ValueError, match=r"conv_v of the pool has strides .*; expected it contiguous"):
        mix.mix(x, low, weights, pool._replace(conv_v=pool.conv_v.mT.contiguous().mT), **OPTIONS)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("memory", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "K", "V", "R"), [(16, 128, 128, 128), (4, 60, 100, 100), (2, 16, 16, 16)])
def test_gpu_real_sizes(H, K, V, R, dtype, memory):
    hold(N=3, H=H, K=K, V=V, R=R, dtype=dtype, memory=memory)
