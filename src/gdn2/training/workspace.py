"""What the operator in PyTorch holds inside its ops, which a step sees as one node each: its own code is run on fake
tensors, unpacked. Elsewhere ops hold nothing to speak of besides their results."""

from typing import Any

import torch
from torch import Tensor

from gdn2.ops import chunk_torch
from gdn2.ops.layout import ChunkLayout
from gdn2.ops.library import chunk_size, residual_shapes


class UnpackedLayout(ChunkLayout):
    """The layout of sequences of one length by its shapes alone."""

    def __init__(self, shape: torch.Size) -> None:
        B, T, H = shape[:3]
        self.C, self.H = chunk_size(T), H
        steps = -(-T // self.C)
        self.M, self.active = B * steps, [B] * steps
        self.order = torch.empty(B, dtype=torch.int64)
        self._rows = torch.empty(self.M, H, self.C, dtype=torch.int64)
        self._where = torch.empty(B * T * H, dtype=torch.int64)

    def _beyond(self, begin: int, end: int) -> Tensor:
        return torch.empty(0, dtype=torch.int64)


def run_inside(op: str, args: tuple[Any, ...]) -> None:
    """Run the code of an op of the operator on the fake tensors `args`; of another op nothing."""
    if op == "gdn2::chunk":
        q, k, v, log_decay, erase, write, initial_state, _, scale, save = args
        x, layout = chunk_torch.Inputs(q, k, v, log_decay, erase, write, scale), UnpackedLayout(k.shape)
        shapes = residual_shapes(k, v, erase, None) if save else [[0]] * 3
        saved = chunk_torch.Saved(*(torch.empty(shape, dtype=x.dtype) for shape in shapes))
        chunk_torch.forward(x, initial_state, layout, saved if save else None)
    elif op == "gdn2::chunk_backward":
        do, d_final, q, k, v, log_decay, erase, write, _, scale, *residuals = args
        x, layout = chunk_torch.Inputs(q, k, v, log_decay, erase, write, scale), UnpackedLayout(k.shape)
        chunk_torch.backward(do, d_final, x, layout, chunk_torch.Saved(*residuals))
