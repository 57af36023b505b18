"""The short convolution in front of the operator: causal, depthwise, followed by SiLU.

    y_t = silu(sum_j weight[:, j] * x_{t - width + 1 + j})        j = 0 .. width - 1, the last tap on the token itself

Each sequence is preceded by its tail, the last ``width - 1`` inputs before it (zeros at the very start).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.fused import fused


def short_conv(
    x: Tensor,
    weight: Tensor,
    tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_tail: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Convolve every channel with its own taps and apply SiLU.

    Args:
        x: [B, T, D], T >= 0.
        weight: [D, width]; rounded to x's dtype, or used as it is by the fused kernel (see `fused`).
        tail: [N, width - 1, D], the inputs just before each sequence, oldest first; zeros when None.
        cu_seqlens: [N + 1] int64 or int32 token offsets that pack N sequences, empty ones included, into B = 1.
            None means N = B sequences of T tokens.
        output_tail: without it the returned tail is None, and its cost is saved.

    Returns:
        y [B, T, D] and the tail [N, width - 1, D] that continues each sequence, both in x's dtype. Differentiable in x,
        weight and tail.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}; expected [B, T, D] and [D, width]"
        )
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or x.shape[0] != 1):
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} and x {list(x.shape)}; expected [N + 1] and a batch of 1"
        )
    B, T, D = x.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    past = weight.shape[1] - 1
    if tail is not None and tail.shape != (N, past, D):
        raise ValueError(f"tail has shape {list(tail.shape)}; expected {[N, past, D]}")
    if fused(x):
        from gdn2.ops.kernels import conv

        return conv.short_conv(x, weight, None if tail is None else tail.to(x.dtype), cu_seqlens, output_tail)
    tail = x.new_zeros(N, past, D) if tail is None else tail.to(x.dtype)
    taps = weight.to(x.dtype).t().contiguous()  # one contiguous row of D per tap: the products below then vectorise

    if cu_seqlens is None:
        inputs = torch.cat([tail, x], dim=1)
        after = inputs[:, T:].clone() if output_tail else None  # a view would keep all of the inputs alive
        return F.silu(_taps(inputs, taps)), after

    # One long sequence in which each sequence stands behind its own tail: token t moves to row t + past * (s + 1).
    sequence = sequence_of_token(cu_seqlens, T)
    token_row = torch.arange(T, device=x.device) + past * (sequence + 1)
    offset = torch.arange(past, device=x.device)
    tail_row = cu_seqlens[:-1, None] + past * torch.arange(N, device=x.device)[:, None] + offset
    rows = x.new_empty(T + N * past, dtype=torch.int64)
    rows[tail_row.flatten()] = torch.arange(N * past, device=x.device)
    rows[token_row] = torch.arange(N * past, N * past + T, device=x.device)
    inputs = torch.cat([tail.flatten(0, 1), x[0]])[rows]
    y = _taps(inputs[None], taps)[:, token_row - past]
    if not output_tail:
        return F.silu(y), None
    ends = cu_seqlens[1:, None] + past * torch.arange(N, device=x.device)[:, None] + offset
    return F.silu(y), inputs[ends]


def sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[tokens] int64: the packed sequence of each token: the number of sequences that end at or before it."""
    at = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    # Not a part of cu_seqlens: inductor takes a slice for the whole on a GPU (pytorch issue 182343).
    return torch.bucketize(at, cu_seqlens, right=True) - 1


def _taps(inputs: Tensor, taps: Tensor) -> Tensor:
    """[B, T + width - 1, D] -> [B, T, D]. Shifted products: on a CPU faster, backward above all, than F.conv1d."""
    T = inputs.shape[1] - taps.shape[0] + 1
    y = inputs[:, :T] * taps[0]
    for j in range(1, taps.shape[0]):
        y = torch.addcmul(y, inputs[:, j : j + T], taps[j])
    return y
