"""SwiGLU, rotary positions and cross-entropy are held to their formulas in float64; interpreted without a GPU."""

import pytest
import torch
import torch.nn.functional as F
from operands import assert_close

from gdn2.layers import attention
from gdn2.ops.kernels import cross_entropy, rotary, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative L2. float32: a few products, exponentials and, over many words, a sum. 16 bits: results are rounded once, to
# 8 bits (bfloat16: within 2^-8, and the interpreter truncates: 2^-7) or to 11.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
IGNORED = -100
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")


def normal(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def held_to(ours, formula, *leaves, bound=None):
    """Result and gradients of ours, on `leaves`, against those of the formula on the same numbers in float64."""
    y, wide = ours(*leaves), [x.detach().double().requires_grad_() for x in leaves]
    expected = formula(*wide)
    upstream = normal(torch.float64, *y.shape, seed=1).detach().to(y.dtype)
    found = torch.autograd.grad(y, leaves, upstream)
    right = torch.autograd.grad(expected, wide, upstream.double())
    assert [g.dtype for g in found] == [x.dtype for x in leaves]
    named = [
        {name: x.detach().double().cpu() for name, x in zip(("y", "d 0", "d 1"), results)}
        for results in ((y, *found), (expected, *right))
    ]
    assert_close(*named, bound or BOUNDS[leaves[0].dtype])


def held_swiglu(dtype, *shape):
    held_to(swiglu.swiglu, lambda gate, up: F.silu(gate) * up, normal(dtype, *shape), normal(dtype, *shape, seed=2))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (2, 0)], ids=str)
def test_swiglu_matches_its_formula(monkeypatch, dtype, shape):
    monkeypatch.setattr(swiglu, "BLOCK", 32)
    held_swiglu(dtype, *shape)


def test_swiglu_of_extreme_gates_is_finite_and_of_strided_ones_the_same():
    gate = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30], device=DEVICE).requires_grad_()
    up = normal(torch.float32, 5)
    gradients = torch.autograd.grad(swiglu.swiglu(gate, up).sum(), (gate, up))
    assert all(g.isfinite().all() for g in gradients)
    wide = normal(torch.float32, 6, 10)
    held_to(lambda x: swiglu.swiglu(*x.chunk(2, -1)), lambda x: F.silu(x[:, :5]) * x[:, 5:], wide)


def held_pair(dtype, rows, width):
    both = normal(dtype, rows, 1, 2 * width).detach()
    gate, up = both.double().chunk(2, dim=-1)
    y = swiglu.swiglu_of_pair(both)
    torch.testing.assert_close(y.double(), F.silu(gate) * up, rtol=BOUNDS[dtype], atol=1e-6)
    assert (y.dtype, y.shape) == (dtype, (rows, 1, width))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "width"), [(2, 48), (3, 5), (1, 5), (0, 4)])
def test_swiglu_of_gate_and_up_side_by_side(monkeypatch, dtype, rows, width):
    monkeypatch.setattr(swiglu, "BLOCK", 32)
    held_pair(dtype, rows, width)


def turned(x, angles):
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def held_rotation(dtype, B, T, heads, D, rows=None, last=100_000):
    """Positions up to `last`, one row of them for all sequences or one for each."""
    positions = torch.arange((rows or 1) * T, device=DEVICE).view(-1, T) * (last // ((rows or 1) * T))
    angles = attention.rotary_angles(positions, attention.rotary_frequencies(D, 1e4, device=DEVICE))
    ours = lambda x: rotary.rotate(x, angles)  # noqa: E731
    # Angles are the same float32 numbers for both; sine and cosine are float32's.
    held_to(ours, lambda x: turned(x, angles.double()), normal(dtype, B, T, heads, D))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "case", [(2, 5, 3, 8, None), (2, 5, 3, 12, 2), (1, 1, 1, 2, None), (0, 3, 1, 4, None)], ids=str
)
def test_rotation_matches_its_formula(dtype, case):
    held_rotation(dtype, *case)


def test_rotation_is_that_of_the_layer():
    x, positions = normal(torch.float32, 2, 7, 2, 8), torch.arange(7, device=DEVICE)[None]
    angles = attention.rotary_angles(positions, attention.rotary_frequencies(8, 1e4, device=DEVICE))
    expected = attention.rotate(x.cpu(), angles.cpu())
    torch.testing.assert_close(rotary.rotate(x, angles).cpu(), expected, rtol=1e-6, atol=1e-6)


def held_loss(dtype, rows, words, bound=None):
    logits = normal(dtype, rows, words)
    targets = torch.randint(words, (rows,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[1::3] = IGNORED
    held_to(
        lambda x: cross_entropy.cross_entropy(4 * x, targets, IGNORED),
        lambda x: F.cross_entropy(4 * x, targets, ignore_index=IGNORED, reduction="none"),
        logits, bound=bound,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(4, 5), (7, 100), (1, 1), (3, 64)], ids=str)
def test_cross_entropy_matches_its_formula(monkeypatch, dtype, shape):
    monkeypatch.setattr(cross_entropy, "BLOCK", 32)
    held_loss(dtype, *shape)


def test_cross_entropy_of_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0], [torch.nan, 0, 0], [0, 0, 0]], device=DEVICE)
    targets = torch.tensor([1, 1, 0, IGNORED], device=DEVICE)
    logits.requires_grad_()
    loss = cross_entropy.cross_entropy(logits, targets, IGNORED)
    assert loss[:2].tolist() == [2e4, 0.0]
    assert loss[2].isnan()
    assert loss[3] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[[0, 1, 3]].tolist() == [[1, -1, 0], [0, 0, 0], [0, 0, 0]]


def test_impossible_words_of_a_whole_block_count_as_none(monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", 8)
    logits = torch.randn(2, 20, device=DEVICE)
    logits[0, :8] = -torch.inf
    logits[1, 8:16] = -torch.inf
    logits.requires_grad_()
    targets = torch.tensor([9, 1], device=DEVICE)
    loss = cross_entropy.cross_entropy(logits, targets, IGNORED)
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x.sum(), logits)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("target", [-1, 3, 2**40])
def test_a_target_that_is_no_word_gives_nan_and_reads_nothing(target):
    loss = cross_entropy.cross_entropy(torch.zeros(1, 3, device=DEVICE), torch.tensor([target], device=DEVICE), IGNORED)
    assert loss.isnan().all()


def test_opcheck_passes():
    gate, up, logits = normal(torch.float32, 2, 6), normal(torch.float32, 2, 6), normal(torch.bfloat16, 3, 5)
    torch.library.opcheck(swiglu._swiglu.library, (gate, up))
    torch.library.opcheck(
        rotary._rotate.library, (normal(torch.bfloat16, 1, 3, 2, 4), torch.rand(1, 3, 2, device=DEVICE), False)
    )
    targets = torch.tensor([0, 4, IGNORED], device=DEVICE)
    torch.library.opcheck(cross_entropy._cross_entropy.library, (logits, targets, IGNORED))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", BOUNDS)
def test_gpu_real_sizes(dtype):
    held_swiglu(dtype, 300, 6_784)
    held_pair(dtype, 64, 6_208)
    held_rotation(dtype, 2, 500, 18, 128)
    held_rotation(dtype, 3, 77, 4, 64, rows=3)
    held_loss(dtype, 100, 32_000)
    held_loss(dtype, 33, 257)


@pytest.mark.gpu
@gpu
@pytest.mark.usefixtures("most_of_the_memory")
def test_gpu_reaches_beyond_2_to_the_31_elements():
    """About 22 GB."""
    rows, end = 2**31 // 32_000 + 10, 5
    logits = torch.randn(rows, 32_000, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(32_000, (rows,), device=DEVICE)
    loss, log_sum = cross_entropy._cross_entropy(logits, targets, IGNORED)
    alone, log_sum_alone = cross_entropy._cross_entropy(logits[-end:], targets[-end:], IGNORED)
    assert torch.equal(loss[-end:], alone)
    dx = cross_entropy._cross_entropy_backward(loss, logits, targets, log_sum, IGNORED)
    tail = logits[-end:], targets[-end:], log_sum_alone
    assert torch.equal(dx[-end:], cross_entropy._cross_entropy_backward(alone, *tail, IGNORED))
    del dx
    assert torch.equal(swiglu.swiglu(logits, logits)[-end:], swiglu.swiglu(logits[-end:], logits[-end:]))
    x = logits.view(1, -1, 250, 128)
    angles = torch.rand(1, x.shape[1], 64, device=DEVICE)
    assert torch.equal(rotary.rotate(x, angles)[:, -end:], rotary.rotate(x[:, -end:], angles[:, -end:]))
