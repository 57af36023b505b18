"""What a model costs, from its configuration alone: parameters, state, arithmetic and memory."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from gdn2.config import ModelConfig
from gdn2.layers import AttentionState
from gdn2.model import LanguageModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = {"4K": 4_096, "1M": 1_048_576}  # tokens whose caches `compare` shows side by side


@dataclass(frozen=True)
class ModelInfo:
    """Counts for one model. One multiply-add is two FLOPs; norms, activations and the embedding lookup are left out.

    parameters: all of them, tied weights once.
    block_parameters: those of the blocks, what a preset is named after.
    embedding_parameters: embedding and output head.
    context: tokens of the sequence that the figures below are for.
    memory_floats: numbers of the recurrent memories alone, HV K V each: what models are matched by.
    state_floats: numbers carried per sequence: the memories with all that comes with them (the tails of the
        convolutions, Mamba-3's angles, last keys and values); per attention 2 W d_model, W being the window (without
        one the context: the state grows).
    state_bytes: bytes of that per sequence, by dtype of the model; the memory is float32 in each.
    forward_flops: per token, the mean over the context: 2 per weight of every Linear, and what each mixer's `flops`
        counts: the recurrence itself, not the larger number that the chunkwise form spends.
    training_flops: 3 forward_flops, the backward pass computing a gradient for either factor of each product.
        Recomputed activations (the logits) are not counted.
    weight_bytes: bytes of all parameters, by dtype of the model; the decay gate's own stay float32 in each.
    """

    parameters: int
    block_parameters: int
    embedding_parameters: int
    context: int
    memory_floats: int
    state_floats: int
    state_bytes: dict[str, int]
    forward_flops: float
    training_flops: float
    weight_bytes: dict[str, int]


def describe(config: ModelConfig, context: int = 4_096) -> ModelInfo:
    """Count for a model reading sequences of `context` tokens. Nothing is allocated.

    ValueError when context is below 1.
    """
    if context < 1:
        raise ValueError(f"context is {context}; expected at least 1 token")
    window = context if config.window is None else config.window
    counts = Counter(config.layer_kinds)  # blocks of a kind are alike: one of each is built
    with torch.device("meta"):
        model = LanguageModel(replace(config, window=window, cell=tuple(counts), num_layers=len(counts)))
    blocks = list(zip(model.blocks, model.mixers(), counts.values()))
    states = [(mixer.initial_state(1), n) for _, mixer, n in blocks]
    linear = sum(n * m.weight.numel() for block, _, n in blocks for m in block.modules() if isinstance(m, nn.Linear))
    forward = 2.0 * (linear + config.vocab_size * config.d_model)
    forward += sum(n * mixer.flops(context) for _, mixer, n in blocks)
    in_blocks = sum(n * p.numel() for block, _, n in blocks for p in block.parameters())
    embedding = model.num_parameters() - model.num_block_parameters() - config.d_model  # less the final norm
    state_bytes, weight_bytes = {}, {}
    for name, dtype in DTYPES.items():
        state_bytes[name] = sum(n * t.nbytes for _, mixer, n in blocks for t in mixer.initial_state(1, dtype=dtype))
        model.to(dtype)
        again = sum((n - 1) * p.nbytes for block, _, n in blocks for p in block.parameters())
        weight_bytes[name] = sum(p.nbytes for p in model.parameters()) + again
    return ModelInfo(
        parameters=in_blocks + embedding + config.d_model,
        block_parameters=in_blocks,
        embedding_parameters=embedding,
        context=context,
        memory_floats=sum(n * s.memory.numel() for s, n in states if not isinstance(s, AttentionState)),
        state_floats=sum(n * t.numel() for s, n in states for t in s if t.is_floating_point()),
        state_bytes=state_bytes,
        forward_flops=forward,
        training_flops=3 * forward,
        weight_bytes=weight_bytes,
    )


def compare(configs: Mapping[str, ModelConfig], context: int = 4_096) -> str:
    """A table of what models cost, a line each, as text: `ModelInfo` at `context` tokens, and the cache at two lengths.

    The memory is the part of the state that models of a size are matched by. The cache is the whole state in bytes, of
    a model in bfloat16 (its memories stay float32). ValueError when context is below 1.
    """
    heads = ["model", "in blocks", "parameters", "memory floats", "state floats", "FLOPs/token"]
    rows = [heads + [f"cache at {length}" for length in LENGTHS]]
    for name, config in configs.items():
        costs = describe(config, context)
        numbers = (costs.block_parameters, costs.parameters, costs.memory_floats, costs.state_floats)
        caches = [describe(config, tokens).state_bytes["bfloat16"] for tokens in LENGTHS.values()]
        row = [name, *(f"{number:,}" for number in numbers), f"{costs.forward_flops:,.0f}"]
        rows.append([*row, *(f"{nbytes:,}" for nbytes in caches)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [row[0].ljust(widths[0]) + "".join(c.rjust(w + 2) for c, w in zip(row[1:], widths[1:])) for row in rows]
    return "\n".join(lines)
