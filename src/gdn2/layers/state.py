"""What a token mixer carries from one segment of a sequence to the next: an argument and a result, never hidden."""

from typing import NamedTuple

import torch
from torch import Tensor


class DeltaState(NamedTuple):
    """State of a delta-rule mixer, one row per sequence.

    conv_q, conv_k [N, conv_width - 1, H * K] and conv_v [N, conv_width - 1, HV * V] are the last inputs of the short
    convolutions, oldest first; memory [N, HV, K, V] is the operator's state, float32 (float64 in a float64 model).
    """

    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor
    memory: Tensor


class Mamba2State(NamedTuple):
    """State of Mamba-2, one row per sequence.

    conv [N, conv_width - 1, H * V + 2 K] are the last inputs of the short convolution (x, B, C), oldest first; memory
    [N, H, K, V] is the operator's state, float32 (float64 in a float64 model).
    """

    conv: Tensor
    memory: Tensor


class Mamba3State(NamedTuple):
    """State of Mamba-3, one row per sequence.

    angles [N, H, pairs] are the rotation so far, in [0, 2 pi], and memory [N, H, K, V] is the operator's state, both
    float32 (float64 in a float64 model); key [N, R, H, K] and value [N, R, H, V] are those of the last token, which
    the next one still writes with.
    """

    angles: Tensor
    memory: Tensor
    key: Tensor
    value: Tensor


class AttentionState(NamedTuple):
    """State of window attention: rings of the last W rotated keys and values, one row per sequence.

    keys, values [N, W, heads, head_dim], the slot of a token being its absolute position mod W; position [N] int64
    counts the tokens seen. With full attention keys and values grow, W being at least the largest position.
    """

    keys: Tensor
    values: Tensor
    position: Tensor


def count_sequences(x: Tensor, d_model: int, cu_seqlens: Tensor | None) -> int:
    """Check a mixer's input and return the number N of sequences in it.

    The values of `cu_seqlens` are read on the CPU only: on a GPU that would stall every layer.
    ValueError when x is not [B, T, d_model] or cu_seqlens does not cut x's tokens into sequences.
    """
    if x.ndim != 3 or x.shape[-1] != d_model:
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, T, {d_model}]")
    if cu_seqlens is None:
        return x.shape[0]
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}; expected int64 or int32 [N + 1]"
        )
    if x.shape[0] != 1:
        raise ValueError(f"x has batch size {x.shape[0]} with cu_seqlens; expected packed sequences in a batch of 1")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        cuts = cu_seqlens.tolist()
        if cuts[0] != 0 or cuts[-1] != x.shape[1] or cuts != sorted(cuts):
            raise ValueError(f"cu_seqlens is {cuts}; expected non-decreasing offsets from 0 to {x.shape[1]}")
    return cu_seqlens.shape[0] - 1
