"""The likeliest token is the first of the largest; under the interpreter without a GPU."""

import pytest
import torch

from gdn2.decoding import likeliest_tokens
from gdn2.ops import fused
from gdn2.ops.kernels import choose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("words", [1, 7, 64, 200])
def test_random_rows(monkeypatch, words):
    monkeypatch.setattr(choose, "BLOCK", 32)
    torch.manual_seed(0)
    logits = torch.randn(9, words, device=DEVICE)
    assert torch.equal(choose.likeliest(logits), logits.argmax(-1))
    assert torch.equal(choose.likeliest(logits.half()), logits.half().argmax(-1))


def test_ties_infinities_and_what_is_broken(monkeypatch):
    monkeypatch.setattr(choose, "BLOCK", 4)
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    rows = [
        ([1, 2, 0, 0, 0, 2, 2], 1),  # a tie in one block and across blocks
        ([0, 0, 0, 0, 3, 1, 3], 4),
        ([-INF] * 7, 0),
        ([-INF, -INF, -INF, -INF, -INF, -3, -INF], 5),
        ([0, INF, 0, 0, 0, INF, 0], 1),
        ([0, 0, 0, 0, 0, NAN, 5], -1),
        ([NAN] * 7, -1),
        ([INF, 0, 0, 0, 0, 0, NAN], -1),
    ]
    logits = torch.tensor([row for row, _ in rows], device=DEVICE)
    assert likeliest_tokens(logits).tolist() == [token for _, token in rows]
    assert likeliest_tokens(logits[:, :6].mT.contiguous().mT).tolist()[:2] == [1, 4]
    assert likeliest_tokens(logits[:0]).tolist() == []


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("words", [32_000, 151_936])
def test_gpu_real_sizes(words):
    torch.manual_seed(0)
    logits = torch.randn(65, words, device=DEVICE)
    logits[3, 5] = NAN
    expected = logits.argmax(-1)
    expected[3] = -1
    assert torch.equal(choose.likeliest(logits), expected)
