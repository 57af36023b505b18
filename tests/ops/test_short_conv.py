import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.short_conv import sequence_of_token, short_conv

# Float64 sums of at most five products of numbers near 1: any order of them agrees to a few 1e-16.
TOLERANCE = 1e-13


def definition(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """One sequence [T, D], one output at a time."""
    D, width = weight.shape
    inputs = torch.cat([tail, x])
    rows = [F.silu((inputs[t : t + width] * weight.t()).sum(0)) for t in range(x.shape[0])]
    return torch.stack(rows) if rows else x.new_zeros(0, D)


def arguments(batch: int, tokens: int, sequences: int, width: int = 4, channels: int = 3) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((batch, tokens, channels), (channels, width), (sequences, width - 1, channels))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 9])
def test_matches_definition(width: int, tokens: int) -> None:
    x, weight, tail = arguments(2, tokens, 2, width)
    y, after = short_conv(x, weight, tail)
    for n in range(2):
        torch.testing.assert_close(y[n], definition(x[n], weight, tail[n]), rtol=0, atol=TOLERANCE)
        assert torch.equal(after[n], torch.cat([tail[n], x[n]])[tokens:])


def test_no_tail_is_a_tail_of_zeros() -> None:
    x, weight, tail = arguments(2, 5, 2)
    assert torch.equal(short_conv(x, weight)[0], short_conv(x, weight, torch.zeros_like(tail))[0])


@pytest.mark.parametrize("cuts", [[1] * 9, [2, 0, 7], [4, 5]], ids=str)
def test_split_sequence_matches_whole(cuts: list[int]) -> None:
    x, weight, tail = arguments(2, sum(cuts), 2)
    y, after = short_conv(x, weight, tail)
    outputs = []
    for part in x.split(cuts, dim=1):
        out, tail = short_conv(part, weight, tail)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), y, rtol=0, atol=TOLERANCE)
    assert torch.equal(tail, after)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[0, 1, 5, 0, 2, 3, 0], [4], [0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_packed_matches_separate(width: int, lengths: list[int], dtype: torch.dtype) -> None:
    N, T = len(lengths), sum(lengths)
    x, weight, tail = arguments(1, T, N, width)
    y, after = short_conv(x, weight, tail, torch.tensor([0, *lengths]).cumsum(0).to(dtype))
    runs = [short_conv(part, weight, tail[n : n + 1]) for n, part in enumerate(x.split(lengths, dim=1))]
    separate, separate_after = (torch.cat([run[i] for run in runs], dim=1 - i) for i in (0, 1))
    torch.testing.assert_close(y, separate, rtol=0, atol=TOLERANCE)
    assert torch.equal(after, separate_after)
    weights = torch.randn_like(y), torch.randn_like(after)
    one = torch.autograd.grad((y, after), (x, weight, tail), weights)
    other = torch.autograd.grad((separate, separate_after), (x, weight, tail), weights)
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("packed", [None, [0, 0, 2, 5]], ids=["batch", "packed"])
def test_gradients(packed: list[int] | None) -> None:
    cu_seqlens = None if packed is None else torch.tensor(packed)
    args = arguments(2, 5, 2) if packed is None else arguments(1, 5, 3)
    assert torch.autograd.gradcheck(lambda *a: short_conv(*a, cu_seqlens), args)


def test_bfloat16_inputs_with_float32_weights_stay_bfloat16() -> None:
    x, weight, tail = (t.detach().float() for t in arguments(2, 6, 2))
    y, after = short_conv(x.bfloat16(), weight, tail)
    assert y.dtype == after.dtype == torch.bfloat16
    # Four products and three sums, each rounded to 8 bits (2^-9 relative) of numbers up to about 5.
    torch.testing.assert_close(y.float(), short_conv(x, weight, tail)[0], rtol=0.02, atol=0.06)


def test_tail_does_not_keep_the_inputs_alive() -> None:
    _, tail = short_conv(torch.randn(1, 1000, 3), torch.randn(3, 4))
    assert tail.untyped_storage().nbytes() == 3 * 3 * 4


def test_sequence_of_token_skips_empty_sequences() -> None:
    assert sequence_of_token(torch.tensor([0, 0, 2, 2, 5]), 5).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    ("x", "weight", "tail", "cu_seqlens", "message"),
    [
        (
            (2, 3),
            (3, 4),
            None,
            None,
            r"x has shape \[2, 3\] and weight \[3, 4\]; expected \[B, T, D\] and \[D, width\]",
        ),
        ((2, 5, 3), (4, 4), None, None, r"x has shape \[2, 5, 3\] and weight \[4, 4\]"),
        ((2, 5, 3), (3,), None, None, r"weight \[3\]"),
        ((2, 5, 3), (3, 4), (2, 4, 3), None, r"tail has shape \[2, 4, 3\]; expected \[2, 3, 3\]"),
        ((1, 5, 3), (3, 4), (1, 3, 3), [0, 2, 5], r"tail has shape \[1, 3, 3\]; expected \[2, 3, 3\]"),
        ((2, 5, 3), (3, 4), None, [0, 5], r"cu_seqlens has shape \[2\] and x \[2, 5, 3\]; expected \[N \+ 1\]"),
        ((1, 5, 3), (3, 4), None, [[0, 5]], r"cu_seqlens has shape \[1, 2\]"),
        ((1, 0, 3), (3, 4), None, [0], r"cu_seqlens has shape \[1\]"),
    ],
)
def test_bad_arguments_are_named(x, weight, tail, cu_seqlens, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        short_conv(
            torch.zeros(x),
            torch.zeros(weight),
            None if tail is None else torch.zeros(tail),
            None if cu_seqlens is None else torch.tensor(cu_seqlens),
        )
