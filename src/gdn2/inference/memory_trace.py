"""What each token does to a delta rule's memory: how much of it fades, what is erased and what is written.

    S' = Diag(alpha) S        e = (erase * k)^T S'        z = write * v        S <- S' + k (z - e)^T

A token takes the value e away from where its key points, and puts z there. The trace reads tokens with the model itself
and notes these per block and head, so that S can be drawn as it changes without ever being sent whole.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gdn2.layers.delta import DeltaMixer
from gdn2.layers.norm import unit_length
from gdn2.layers.state import DeltaState
from gdn2.model import LanguageModel
from gdn2.ops.short_conv import short_conv


class HeadUpdate(NamedTuple):
    """One token's change of one head's memory: S <- Diag(alpha) S + key (write - erase)^T.

    alpha, key [K]; erase, write [V]: the values e and z taken from and put to the key's place.
    """

    alpha: Tensor
    key: Tensor
    erase: Tensor
    write: Tensor


class TokenTrace(NamedTuple):
    """Sizes of one token's changes in every memory [blocks, heads], as Frobenius norms, and one head's change whole."""

    faded: Tensor
    erased: Tensor
    written: Tensor
    head: HeadUpdate


def traced_blocks(model: LanguageModel) -> list[int]:
    """The blocks whose memory follows a delta rule, first to last; none in other models."""
    return [i for i, mixer in enumerate(model.mixers()) if isinstance(mixer, DeltaMixer)]


class MemoryTrace:
    """Reads a text and tells what every token did to the memories.

    Args:
        model: in evaluation mode, with at least one block of a delta rule.
        block: the block, and head: its value head, of which whole updates are told.

    Raises:
        ValueError: a model without such blocks, or a block or head that it does not have.
    """

    def __init__(self, model: LanguageModel, block: int, head: int = 0) -> None:
        blocks = traced_blocks(model)
        if not blocks:
            raise ValueError(f"the model's mixer is {model.config.mixer!r}; expected a delta rule, whose memory erases")
        if block not in blocks:
            raise ValueError(f"block is {block}; expected one with a memory, of {', '.join(map(str, blocks))}")
        mixers: list[Any] = model.mixers()
        heads = mixers[block].num_value_heads
        if not 0 <= head < heads:
            raise ValueError(f"head is {head}; expected 0 to {heads - 1}")
        self.model, self.block, self.head = model, blocks.index(block), head
        self.state: Any = model.initial_state(1)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> list[TokenTrace]:
        """Read more tokens, one or more; returns a trace of each, on the CPU in float32."""
        blocks, self.state = trace_blocks(self.model, tokens, self.state)
        sizes = [torch.stack([getattr(block, name) for block in blocks], 1) for name in ("faded", "erased", "written")]
        chosen = blocks[self.block]
        head = (part[:, self.head] for part in (chosen.alpha, chosen.key, chosen.erase, chosen.write))
        rows = zip(*(part.float().cpu() for part in (*sizes, *head)))
        return [TokenTrace(row[0], row[1], row[2], HeadUpdate(*row[3:])) for row in rows]


class BlockTrace(NamedTuple):
    """What T tokens did to the memories of one block's HV heads, in the memory's dtype.

    faded, erased, written [T, HV]: Frobenius norms of the changes; alpha, key, along [T, HV, K]: what is kept, where
    the token writes, and where it erases (its erase gate times its key); erase, write [T, HV, V]: the values e and z;
    erase_gate [T, H, K or 1], write_gate [T, HV, V or 1].
    """

    faded: Tensor
    erased: Tensor
    written: Tensor
    alpha: Tensor
    key: Tensor
    along: Tensor
    erase: Tensor
    write: Tensor
    erase_gate: Tensor
    write_gate: Tensor


@torch.inference_mode()
def trace_blocks(model: LanguageModel, tokens: Sequence[int], state: Any) -> tuple[list[BlockTrace], Any]:
    """Read tokens from a state of one sequence; the trace of each block with a delta rule, and the state after them."""
    inputs: dict[nn.Module, tuple[Tensor, DeltaState]] = {}

    def note(mixer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[mixer] = args[0], args[1]

    mixers = [mixer for mixer in model.mixers() if isinstance(mixer, DeltaMixer)]
    hooks = [mixer.register_forward_pre_hook(note) for mixer in mixers]
    try:
        ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
        _, state = model(ids, state)
    finally:
        for hook in hooks:
            hook.remove()
    return [_updates(mixer, *inputs[mixer]) for mixer in mixers], state


def _updates(mixer: DeltaMixer, x: Tensor, state: DeltaState) -> BlockTrace:
    """Run the recurrence of a mixer's memory on x [1, T, d_model], token by token, from the state before it."""
    group = mixer.num_value_heads // mixer.num_heads
    k, _ = short_conv(mixer.k_proj(x), mixer.conv_k, state.conv_k)
    v, _ = short_conv(mixer.v_proj(x), mixer.conv_v, state.conv_v)
    key = unit_length(k.unflatten(-1, (mixer.num_heads, mixer.key_dim))).repeat_interleave(group, 2)[0]
    v = v.unflatten(-1, (mixer.num_value_heads, mixer.value_dim))[0]
    log_decay, erase_gate, write_gate = mixer.gates(x)
    S = state.memory[0]
    key, v = key.to(S.dtype), v.to(S.dtype)
    alpha = torch.ones_like(key)
    if log_decay is not None:
        alpha = alpha * log_decay[0].to(S.dtype).exp().repeat_interleave(group, 1)
    erase_gate, write_gate = erase_gate[0].to(S.dtype), write_gate[0].to(S.dtype)
    along = erase_gate.repeat_interleave(group, 1) * key
    write = write_gate * v
    faded, erased = [], []
    for t in range(x.shape[1]):
        kept = alpha[t, :, :, None] * S
        faded.append((S - kept).norm(dim=(1, 2)))
        erased.append(torch.einsum("hk,hkv->hv", along[t], kept))
        S = kept + key[t, :, :, None] * (write[t] - erased[-1])[:, None]
    erase, lengths = torch.stack(erased), key.norm(dim=-1)
    sizes = torch.stack(faded), lengths * erase.norm(dim=-1), lengths * write.norm(dim=-1)
    return BlockTrace(*sizes, alpha, key, along, erase, write, erase_gate, write_gate)
