"""What a token mixer carries from one segment of a sequence to the next: an argument and a result, never hidden."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.layers.linear import at_least_float32


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


def join_states(states: Sequence[Any]) -> Any:
    """One model state with the rows of all `states`, each a tuple of blocks, a block a named tuple of [N, ...] tensors.

    Full attention's keys and values, which grow with the text, are filled up with empty slots to the longest.
    """
    return tuple(type(blocks[0])(*map(_stack, zip(*blocks))) for blocks in zip(*states))


def _stack(parts: tuple[Tensor, ...]) -> Tensor:
    if len({part.shape[1:] for part in parts}) > 1:  # full attention: an empty slot is one no position has reached
        slots = max(part.shape[1] for part in parts)
        parts = tuple(F.pad(part, (0, 0) * (part.ndim - 2) + (0, slots - part.shape[1])) for part in parts)
    return torch.cat(parts)


def state_rows(state: Any, rows: slice | Tensor) -> Any:
    """The model state of some sequences; with an index [M] int64 in that order, repeated rows too."""
    return tuple(type(block)(*(tensor[rows] for tensor in block)) for block in state)


def own_state(state: Any) -> Any:
    """The same model state in tensors that keep no larger ones alive, as a row of a batch would."""

    def own(tensor: Tensor) -> Tensor:
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)

    return tuple(type(block)(*map(own, block)) for block in state)


def overwrite(state: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Copy the tensors of a block's state into those of another, whose dtypes they take."""
    for tensor, value in zip(state, new):
        tensor.copy_(value)


def with_room(state: Any, slots: int) -> Any:
    """The model state with room for `slots` tokens in its full attention: empty slots are added, or cut off the end."""

    def fit(tensor: Tensor) -> Tensor:
        tensor = tensor[:, :slots]
        return F.pad(tensor, (0, 0, 0, 0, 0, slots - tensor.shape[1]))

    return tuple(
        block._replace(keys=fit(block.keys), values=fit(block.values)) if isinstance(block, AttentionState) else block
        for block in state
    )


def with_memory(state: Any, dtype: torch.dtype | None) -> Any:
    """The model state with memories in another dtype; all else as it is. None changes nothing."""
    return tuple(
        block if dtype is None or isinstance(block, AttentionState) else block._replace(memory=block.memory.to(dtype))
        for block in state
    )


def wide_memory(state: Any) -> Any:
    """The model state, None too, with memories in at least float32, as a forward pass takes them."""
    if state is None:
        return None
    return tuple(
        block if isinstance(block, AttentionState) else block._replace(memory=at_least_float32(block.memory))
        for block in state
    )


def check_memory_dtype(dtype: torch.dtype | None) -> None:
    """ValueError for a dtype that memories are not kept in."""
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"memory_dtype is {dtype}; expected torch.float32, torch.bfloat16 or None")


def state_bytes(state: Any) -> int:
    """Bytes of all tensors of a model state."""
    return sum(tensor.numel() * tensor.element_size() for block in state for tensor in block)


def check_kind(state: object, kind: type) -> None:
    """ValueError when a mixer was handed the state of another kind of mixer; None is no state."""
    if state is not None and not isinstance(state, kind):
        raise ValueError(f"state is a {type(state).__name__}; expected {kind.__name__} or None")


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
