"""Where the chunks of a batch lie, and the segments into which few long sequences are cut for the scans.

Nothing here looks at a tensor's values from the host: how many there are at most follows from shapes, which exist is
found on the device.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """There are at most M chunks; one that does not exist has length 0."""

    token: Tensor  # [M] int64, first token
    length: Tensor  # [M] int32, tokens in it


class Spans(NamedTuple):
    """What one program of a scan runs through: S sequences, or segments of them."""

    start: Tensor  # [S + 1] int64, first token of each, and the total
    first: Tensor  # [S + 1] int32, first chunk of each, and the total


class Segments(NamedTuple):
    """Segments of L chunks; the last one of a sequence may be shorter, and an empty sequence has an empty one."""

    spans: Spans
    of: Tensor  # [N + 1] int64, first segment of each sequence, and the total


class Layout(NamedTuple):
    """Chunks, sequences, and segments if the sequences are cut."""

    chunks: Chunks
    sequences: Spans
    segments: Segments | None


def _running(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _locate(start: Tensor, M: int, C: int, L: int, S: int) -> Layout:
    N = len(start) - 1
    counts = (start.diff() + (C - 1)) // C
    first = _running(counts)
    chunk = torch.arange(M, device=start.device)
    sequence = torch.searchsorted(first[1:], chunk, right=True).clamp(max=N - 1)
    token = start[sequence] + (chunk - first[sequence]) * C
    length = (start[sequence + 1] - token).clamp(min=0, max=C)
    chunks, sequences = Chunks(token, length.to(torch.int32)), Spans(start, first.to(torch.int32))
    if L == 0:
        return Layout(chunks, sequences, None)
    of = _running(((counts + (L - 1)) // L).clamp(min=1))
    segment = torch.arange(S + 1, device=start.device)
    sequence = torch.searchsorted(of[1:], segment, right=True).clamp(max=N - 1)
    skipped = (segment - of[sequence]) * L
    begin = torch.minimum(start[sequence] + skipped * C, start[sequence + 1])
    chunk = torch.minimum(first[sequence] + skipped, first[sequence + 1])
    return Layout(chunks, sequences, Segments(Spans(begin, chunk.to(torch.int32)), of))


@lru_cache(maxsize=32)
def _equal(B: int, T: int, C: int, L: int, S: int, device: torch.device) -> Layout:
    # Made on the CPU: the copy is complete when it returns, so that any stream may read it, and outside inference mode
    # for the sake of a later training step.
    with torch.inference_mode(False):
        chunks, sequences, segments = _locate(torch.arange(B + 1, device="cpu") * T, B * -(-T // C), C, L, S)
        return Layout(
            Chunks(*(x.to(device) for x in chunks)),
            Spans(*(x.to(device) for x in sequences)),
            segments and Segments(Spans(*(x.to(device) for x in segments.spans)), segments.of.to(device)),
        )


def chunk_count(k: Tensor, cu_seqlens: Tensor | None, C: int) -> int:
    """M, known without a look at cu_seqlens: each packed sequence adds at most one short chunk."""
    B, T = k.shape[:2]
    return B * -(-T // C) if cu_seqlens is None else T // C + cu_seqlens.shape[0] - 1


def sequence_count(k: Tensor, cu_seqlens: Tensor | None) -> int:
    return k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def segment_count(M: int, N: int, L: int) -> int:
    """At most so many segments of L chunks; L = 0 means that sequences are not cut."""
    return M // L + N if L else 0


def locate(k: Tensor, cu_seqlens: Tensor | None, C: int, L: int) -> Layout:
    """The layout of k [B, T, ...] in chunks of C tokens, with segments of L chunks unless L is 0."""
    B, T = k.shape[:2]
    M = chunk_count(k, cu_seqlens, C)
    S = segment_count(M, sequence_count(k, cu_seqlens), L)
    if cu_seqlens is None:
        return _equal(B, T, C, L, S, k.device)
    # Offsets that are no partition give undefined outputs, but touch nothing else: see `debug_checks`.
    start = cu_seqlens.to(device=k.device, dtype=torch.int64).clamp(0, T).cummax(0).values
    return _locate(start, M, C, L, S)
