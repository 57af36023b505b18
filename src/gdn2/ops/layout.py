"""Where each token sits once sequences are cut into chunks of C tokens.

Chunks are laid out step-major: first the first chunk of every sequence, then the second of every sequence that has
one, and so on, longest sequences first. The scan over steps then works on contiguous slices that only ever shrink, and
batches, ragged lengths and packed sequences are one case. Positions beyond a sequence's end read as zeros, which
neither decay, erase nor write.
"""

import torch
from torch import Tensor


def sequence_bounds(cu_seqlens: Tensor, T: int) -> Tensor:
    """`cu_seqlens` [N + 1] as int64 on the CPU. ValueError if it does not partition T tokens."""
    bounds = cu_seqlens.to(device="cpu", dtype=torch.int64)
    if bounds[0] != 0 or bounds[-1] != T or bool((bounds.diff() < 0).any()):
        values = bounds.tolist()
        shown = values if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
        raise ValueError(f"cu_seqlens is {shown}; expected non-decreasing offsets from 0 to T = {T}")
    return bounds


class ChunkLayout:
    """The chunks of N sequences.

    Attributes:
        C: tokens per chunk.
        order: [N] indices of the sequences, longest first; the scan keeps its states in this order.
        active: number of sequences that have a j-th chunk, for each step j; their sum M is the number of chunks.
    """

    def __init__(self, shape: torch.Size, cu_seqlens: Tensor | None, C: int, device: torch.device) -> None:
        """`shape` is that of k, [B, T, H, K]. ValueError if `cu_seqlens` does not partition the T tokens."""
        B, T, H = shape[:3]
        if cu_seqlens is None:
            starts, lengths = torch.arange(B) * T, torch.full((B,), T)
        else:
            bounds = sequence_bounds(cu_seqlens, T)
            starts, lengths = bounds[:-1], bounds.diff()
        counts = (lengths + C - 1) // C
        order = torch.argsort(counts, descending=True, stable=True)
        steps = int(counts.max()) if len(counts) else 0
        step, rank = torch.nonzero(torch.arange(steps).unsqueeze(1) < counts[order], as_tuple=True)
        sequence = order[rank]
        token = (starts[sequence] + step * C).unsqueeze(1) + torch.arange(C)
        valid = step.unsqueeze(1) * C + torch.arange(C) < lengths[sequence].unsqueeze(1)

        self.C, self.H, self.M = C, H, len(step)
        self.active: list[int] = torch.bincount(step, minlength=steps).tolist()
        self.order = order.to(device)
        rows = torch.where(valid, token, 0).unsqueeze(1) * H + torch.arange(H).unsqueeze(1)
        real = valid.unsqueeze(1).expand_as(rows)
        where = torch.empty(B * T * H, dtype=torch.int64)
        where[rows[real]] = torch.arange(rows.numel()).view_as(rows)[real]
        self._rows, self._where = rows.to(device), where.to(device)
        self._pad = torch.nonzero(~real.reshape(-1)).squeeze(1)

    def cut(self, x: Tensor, begin: int, end: int) -> Tensor:
        """Chunks begin to end of x [B, T, H, ...]: [M, H, C, ...], zeros beyond the end of a sequence."""
        rest = x.shape[3:]
        if x.stride(-1) == 0 and x.shape[-1] > 1:  # one number for all channels: read it once
            return self.cut(x[..., :1], begin, end).expand(-1, -1, -1, *rest)
        rows = self._rows[begin:end]
        out = x.reshape(-1, *rest).index_select(0, rows.reshape(-1))
        beyond = self._beyond(begin, end)
        if len(beyond):
            out.index_fill_(0, beyond.to(x.device), 0)
        return out.view(*rows.shape, *rest)

    def _beyond(self, begin: int, end: int) -> Tensor:
        """Which rows of chunks begin to end lie behind their sequence."""
        first, last = torch.searchsorted(self._pad, torch.tensor([begin, end]) * self.H * self.C).tolist()
        return self._pad[first:last] - begin * self.H * self.C

    def join(self, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """All chunks [M * H, C, ...] as `shape` [B, T, H, ...]: the inverse of `cut`."""
        rest = x.shape[2:]
        return x.reshape(-1, *rest).index_select(0, self._where).to(dtype).reshape(shape)

    def segments(self, rows: int) -> list[tuple[list[int], int, int]]:
        """Runs of steps that hold about `rows` rows (tokens x heads): (active sequences of each step, begin, end)."""
        runs: list[tuple[list[int], int, int]] = []
        steps: list[int] = []
        begin = end = 0
        for n in self.active:
            steps.append(n)
            end += n
            if (end - begin) * self.H * self.C >= rows:
                runs.append((steps, begin, end))
                steps, begin = [], end
        return [*runs, (steps, begin, end)] if steps else runs
