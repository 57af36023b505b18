import pytest
import torch

from gdn2.layers.state import count_sequences


def test_sequences_are_rows_or_packed_pieces() -> None:
    assert count_sequences(torch.zeros(3, 5, 4), 4, None) == 3
    assert count_sequences(torch.zeros(1, 5, 4), 4, torch.tensor([0, 0, 5])) == 2
    assert count_sequences(torch.zeros(1, 0, 4), 4, torch.tensor([0, 0], dtype=torch.int32)) == 1


@pytest.mark.parametrize(
    ("shape", "cu_seqlens", "message"),
    [
        ((5, 4), None, r"x has shape \[5, 4\]; expected \[B, T, 4\]"),
        ((1, 5, 3), None, r"x has shape \[1, 5, 3\]; expected \[B, T, 4\]"),
        ((2, 5, 4), [0, 5], "x has batch size 2 with cu_seqlens; expected packed sequences in a batch of 1"),
        ((1, 5, 4), [0.0, 5.0], r"cu_seqlens is torch.float32 of shape \[2\]; expected int64 or int32 \[N \+ 1\]"),
        ((1, 5, 4), [[0, 5]], r"cu_seqlens is torch.int64 of shape \[1, 2\]"),
        ((1, 5, 4), [0], r"cu_seqlens is torch.int64 of shape \[1\]"),
        ((1, 5, 4), [0, 4], r"cu_seqlens is \[0, 4\]; expected non-decreasing offsets from 0 to 5"),
        ((1, 5, 4), [1, 5], r"cu_seqlens is \[1, 5\]"),
        ((1, 5, 4), [0, 3, 2, 5], r"cu_seqlens is \[0, 3, 2, 5\]"),
    ],
)
def test_bad_inputs_are_named(shape, cu_seqlens, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        count_sequences(torch.zeros(shape), 4, None if cu_seqlens is None else torch.tensor(cu_seqlens))
