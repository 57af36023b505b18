"""The fused short convolution is held to the torch one in float64; under the interpreter without a GPU."""

import pytest
import torch
from operands import assert_close

from gdn2.ops.kernels import conv
from gdn2.ops.short_conv import short_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative L2. float32: sums of a few products (of all tokens for the taps). 16 bits: each result is rounded once, dx
# twice where a tail was handed on, to 8 bits (bfloat16: within 2^-8, and the interpreter truncates) or to 11.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}


def arguments(B=2, T=20, D=5, width=4, N=None, tail=True, dtype=torch.float64):
    torch.manual_seed(0)
    normal = lambda *s: torch.randn(*s, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()  # noqa: E731
    return normal(B, T, D), normal(D, width), normal(N or B, width - 1, D) if tail else None


def results(function, x, weight, tail, cu_seqlens, output_tail):
    """Outputs and gradients for one fixed upstream gradient of both outputs, in float64 on the CPU."""
    y, after = function(x, weight, tail, cu_seqlens, output_tail)
    outputs = {"y": y} | ({"tail": after} if output_tail else {})
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs.values()]
    leaves = {n: t for n, t in (("x", x), ("weight", weight), ("tail", tail)) if t is not None}
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    named = outputs | {f"d {n}": g for n, g in zip(leaves, gradients)}
    return {n: t.detach().double().cpu() for n, t in named.items() if t.numel()}


def by_torch(x, weight, tail, cu_seqlens, output_tail):
    return short_conv(x, weight, tail, cu_seqlens)


def held_to_torch(x, weight, tail, cu_seqlens=None, output_tail=True, bound=None):
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, tail)]
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    expected = results(by_torch, *wide, cu_seqlens, output_tail)
    got = results(conv.short_conv, x, weight, tail, cu_seqlens, output_tail)
    assert got.keys() == expected.keys()
    assert_close(got, expected, bound or BOUNDS[x.dtype])


@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize("T", [1, 3, 37])
def test_matches_torch_for_any_width_and_length(T, width):
    held_to_torch(*arguments(T=T, width=width, dtype=torch.float32))


@pytest.mark.parametrize("D", [1, 16, 23])
@pytest.mark.parametrize("tail", [True, False])
def test_matches_torch_for_any_channels_with_and_without_tail(D, tail):
    held_to_torch(*arguments(D=D, tail=tail, dtype=torch.float32), output_tail=tail)


@pytest.mark.parametrize("lengths", [[0, 1, 5, 0, 2, 3, 0, 30], [4], [0, 0], [1] * 9], ids=str)
@pytest.mark.parametrize("tail", [True, False])
def test_packed_sequences_match_torch(lengths, tail):
    cu_seqlens = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    held_to_torch(*arguments(1, sum(lengths), N=len(lengths), tail=tail, dtype=torch.float32), cu_seqlens)


def test_packed_sequences_match_separate_ones_bit_for_bit():
    x, weight, tail = arguments(1, 20, N=2, dtype=torch.float32)
    y, after = conv.short_conv(x, weight, tail, torch.tensor([0, 13, 20], dtype=torch.int32, device=DEVICE), True)
    for n, span in enumerate((slice(0, 13), slice(13, 20))):
        alone, alone_after = conv.short_conv(x[:, span], weight, tail[n : n + 1], None, True)
        assert torch.equal(y[:, span], alone)
        assert torch.equal(after[n : n + 1], alone_after)


def walled(x):
    """x among NaNs in memory: what reads beyond it is found."""
    wall = torch.full((3, 4096), float("nan"), dtype=x.dtype, device=x.device)
    wall[1, : x.numel()] = x.detach().flatten()
    return wall[1, : x.numel()].view(x.shape).requires_grad_()


@pytest.mark.parametrize(
    "starts", [[0, -50, 500, 20], [0, 9, 4, 20], [5, 5, 5, 5], [3, 7, 7, 12], [20, 0, 20, 0]], ids=str
)
@pytest.mark.parametrize("tail", [True, False])
def test_offsets_that_are_no_partition_reach_nothing_else(starts, tail):
    x, weight, before = arguments(1, 20, N=3, tail=tail, dtype=torch.float32)
    operands = walled(x), weight, None if before is None else walled(before)
    got = results(conv.short_conv, *operands, torch.tensor(starts, device=DEVICE), True)
    assert all(torch.isfinite(t).all() for t in got.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_rounded_once(dtype):
    held_to_torch(*arguments(D=16, dtype=dtype))


def test_strided_tensors_match_contiguous_ones():
    x, weight, tail = arguments(D=16, dtype=torch.float32)
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in (x, weight, tail)]
    expected, got = (results(conv.short_conv, *leaves, None, True) for leaves in ((x, weight, tail), strided))
    assert_close(got, expected, 0)


def test_preactivations_of_any_size_stay_finite():
    x, weight, _ = arguments(tail=False, dtype=torch.float32)
    x.data *= 1e4
    held_to_torch(x, weight, None)


@pytest.mark.parametrize("case", ["batch", "packed", "no tail"])
def test_opcheck_passes(case):
    x, weight, tail = arguments(1, 9, N=2, tail=case == "packed", dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 2, 9], device=DEVICE) if case == "packed" else None
    torch.library.opcheck(conv._short_conv.library, (x, weight, tail, cu_seqlens, case != "no tail"))


@pytest.mark.parametrize("packed", [None, [0, 2, 20]])
def test_torch_returns_no_tail_either_unless_wanted(packed):
    x, weight, _ = arguments(1, tail=False)
    cu_seqlens = None if packed is None else torch.tensor(packed, device=DEVICE)
    y, after = short_conv(x, weight, None, cu_seqlens, output_tail=False)
    assert after is None
    assert torch.equal(y, short_conv(x, weight, None, cu_seqlens)[0])


def test_inputs_without_gradients_are_left_out():
    x, weight, tail = arguments(dtype=torch.float32)
    y, _ = conv.short_conv(x.detach(), weight.detach(), tail, None, True)
    (gradient,) = torch.autograd.grad(y.sum(), tail)
    assert bool(gradient.any())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [2, 4])
def test_gpu_matches_torch(dtype, width):
    held_to_torch(*arguments(2, 1000, 2048, width, dtype=dtype))
    held_to_torch(*arguments(1, 999, 300, width, N=4, dtype=dtype), [0, 500, 500, 502, 999])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_gives_the_same_bits_twice():
    tensors = arguments(2, 3000, 2048, dtype=torch.bfloat16)
    once, twice = (results(conv.short_conv, *tensors, None, True) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.usefixtures("most_of_the_memory")
def test_gpu_reaches_beyond_2_to_the_31_elements():
    """17 GB."""
    D, end = 2048, 100
    T = 2**31 // D + end
    x = torch.randn(1, T, D, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(D, 4, device=DEVICE)
    cu_seqlens = torch.tensor([0, T - end, T], device=DEVICE)
    y, after = conv.short_conv(x, weight, None, cu_seqlens, True)
    alone = x.detach()[:, -end:].clone().requires_grad_()
    expected, expected_after = conv.short_conv(alone, weight, None, None, True)
    assert torch.equal(y[:, -end:], expected)
    assert torch.equal(after[1:], expected_after)
    (gradient,) = torch.autograd.grad(y, x, x.detach())
    (expected,) = torch.autograd.grad(expected, alone, alone.detach())
    assert torch.equal(gradient[:, -end:], expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_gpu_packs_more_sequences_than_a_grid_dimension_holds():
    lengths = torch.arange(100_000) % 4
    tokens = int(lengths.sum())
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).tolist()
    held_to_torch(*arguments(1, tokens, 16, N=len(lengths), dtype=torch.float32), cu_seqlens)
