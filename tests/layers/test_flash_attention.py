"""The form of window attention that a GPU takes: what it asks of torch's FlashAttention, and there what comes back."""

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from gdn2.layers import SlidingWindowAttention
from gdn2.layers.attention import has_flash
from gdn2.ops.fused import planning

PACKED = torch.tensor([0, 1, 1, 12, 19])


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """By torch's documentation of the function of this name: a window of (left, right) keys besides one's own."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.diff().max() <= max_q
    assert cu_seq_k.diff().max() <= max_k
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for begin, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:]):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        ahead = torch.arange(end - begin) - torch.arange(end - begin)[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        for limit, distance in zip(window_size, (-ahead, ahead)):
            seen &= (limit < 0) | (distance <= limit)
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("scaling", ["none", "yarn"])
@pytest.mark.parametrize("window", [1, 4, 12, 19, 50, None])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["batch", "packed"])
def test_every_form_asks_for_the_same(
    monkeypatch: pytest.MonkeyPatch, window: int | None, cu_seqlens: Tensor | None, scaling: str
) -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(12, 2, window, 100.0, scaling, 1.0 if scaling == "none" else 3.0).double()
    x = torch.randn(1 if cu_seqlens is not None else 2, 19, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(*x.shape, dtype=torch.float64)
    results, calls = [], 0

    def counted(*args: object, **options: object) -> Tensor:
        nonlocal calls
        calls += 1
        return varlen_attn(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", counted)
    for flash in (False, True):
        monkeypatch.setattr("gdn2.layers.attention.has_flash", lambda *_, flash=flash: flash)
        y, _ = layer(x, None, cu_seqlens, output_state=False)
        results.append((y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)))
    # A batch whose sequences are no longer than the window is plain causal attention either way.
    assert calls == int(cu_seqlens is not None or (window is not None and window < 19))
    for ours, expected in zip(*reversed(results)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)  # float64, sums in another order


def test_only_16_bits_on_the_path_of_a_gpu_take_it() -> None:
    x = torch.zeros(1, 4, 256)
    assert not has_flash(x.bfloat16(), 64)  # a CPU
    pytest.importorskip("triton")
    with planning():
        assert has_flash(x.bfloat16(), 64)
        assert has_flash(x.half(), 128)
        assert not has_flash(x, 64)
        assert not has_flash(x.double(), 64)
        assert not has_flash(x.bfloat16(), 256)
        assert not has_flash(x.bfloat16(), 12)
        with torch.autocast("cpu", torch.bfloat16):
            assert has_flash(x, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [2, 64, 200, 2_048, None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")  # of a backward that is a process's first
def test_gpu_flash_is_the_masked_form_to_rounding(
    monkeypatch: pytest.MonkeyPatch, window: int | None, packed: bool
) -> None:
    """Held to float64 on the CPU; the masked form in bfloat16 on the GPU is not closer to it."""
    torch.manual_seed(0)
    T, device = 600, torch.device("cuda")
    cu_seqlens = torch.tensor([0, 1, 1, 130, 131, 500, T]) if packed else None
    layer = SlidingWindowAttention(256, 2, window).to(device)
    exact = SlidingWindowAttention(256, 2, window).double()
    exact.load_state_dict(layer.state_dict())
    drawn, upstream = torch.randn(2, 1 if packed else 2, T, 256)

    def results(model: SlidingWindowAttention, where: torch.device, dtype: torch.dtype) -> list[Tensor]:
        x = drawn.to(where, dtype).requires_grad_()
        bounds = None if cu_seqlens is None else cu_seqlens.to(where)
        with torch.autocast("cuda", torch.bfloat16, enabled=where.type == "cuda"):
            y, _ = model(x, None, bounds, output_state=False)
        gradients = torch.autograd.grad(y, [x, *model.parameters()], upstream.to(y))
        return [t.detach().double().cpu() for t in (y, *gradients)]

    expected = results(exact, torch.device("cpu"), torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        flash = results(layer, device, torch.float32)
    names = {event.key for event in profile.key_averages()}
    assert ("torch_attn::_varlen_attn" in names) == (packed or (window is not None and window < T))
    monkeypatch.setattr("gdn2.layers.attention.has_flash", lambda *_: False)
    masked = results(layer, device, torch.float32)
    for ours, other, right in zip(flash, masked, expected):
        error, usual = ((t - right).norm() / right.norm() for t in (ours, other))
        assert error < max(0.02, 1.5 * float(usual))  # a few roundings to 8 bits, 0.2 to 0.4 % each
