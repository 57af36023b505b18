"""How well a model predicts held-out text: nats, perplexity, bits per byte, and the loss along the context."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from gdn2.data import TokenFile
from gdn2.model import LanguageModel

FORWARD_TOKENS = 2_048  # tokens in one forward pass; their logits are all that is held at once
LARGEST_NATS = 700  # exp of more is no float


@dataclass(frozen=True)
class PositionScore:
    """Mean loss over the targets whose place in their window is in [start, stop); `bits_per_byte` as below."""

    start: int
    stop: int
    nats: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class LanguageScore:
    """Nats per token, exp of it, bits per byte of text (None where the targets hold no byte, as one end-of-text token
    alone), the curve along the context in buckets that double in width, and how many targets were scored."""

    nats: float
    perplexity: float
    bits_per_byte: float | None
    by_position: tuple[PositionScore, ...]
    tokens: int


@torch.inference_mode()
def perplexity(
    model: LanguageModel,
    token_file: TokenFile,
    seq_len: int,
    tokens: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LanguageScore:
    """Score at most `tokens` targets of the file, in whole windows, one at least.

    The windows are `seq_len` targets long, apart from each other and spread evenly over the file, the same at every
    call and the same as a training run's validation; each starts from an empty state. They may be of any length, in
    memory that does not grow with it: a window is read in pieces that hand on the state. `progress` is told how many
    targets are done, and of how many.

    ValueError for seq_len or tokens below 1, for a file shorter than seq_len + 1, for a vocabulary larger than the
    model's, and for a loss that is no number.
    """
    for name, value in (("seq_len", seq_len), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected an integer >= 1")
    if len(token_file) < seq_len + 1:
        raise ValueError(f"{token_file.path.name} has {len(token_file)} tokens; expected more than seq_len ({seq_len})")
    vocab = model.config.vocab_size
    if token_file.meta.vocab_size > vocab:
        raise ValueError(f"the text's vocabulary has {token_file.meta.vocab_size} tokens, the model's {vocab}")
    whole = (len(token_file) - 1) // seq_len
    windows = min(whole, max(1, tokens // seq_len))
    starts = (np.linspace(0, whole - 1, windows).round().astype(int) * seq_len).tolist()
    nats = torch.zeros(seq_len, dtype=torch.float64)
    edges = [0, *(2**i for i in range(4, 64) if 2**i < seq_len), seq_len]
    size = np.zeros(len(edges) - 1)  # bytes of text in each bucket
    rows = max(1, FORWARD_TOKENS // seq_len)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, windows, rows):
            batch = np.stack([token_file.tokens[s : s + seq_len + 1] for s in starts[first : first + rows]])
            text = torch.from_numpy(batch.astype(np.int64))
            nats += _losses(model, text, device)
            size += [token_file.bytes_of(text[:, a + 1 : b + 1]) for a, b in pairwise(edges)]
            progress((first + len(text)) * seq_len, windows * seq_len)
    finally:
        model.train(was_training)
    mean = float(nats.mean()) / windows
    if not mean < LARGEST_NATS:
        raise ValueError(f"the mean loss is {mean} nats; expected a number < {LARGEST_NATS}: the weights are broken")
    by_position = tuple(
        PositionScore(a, b, float(nats[a:b].mean()) / windows, _bits(nats[a:b], bytes_))
        for (a, b), bytes_ in zip(pairwise(edges), size)
    )
    return LanguageScore(mean, exp(mean), _bits(nats, size.sum()), by_position, windows * seq_len)


def _losses(model: LanguageModel, text: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Sum over the rows of text [B, T + 1] of the nats of each target; [T] float64 on the CPU."""
    state: Any = None
    pieces = []
    for tokens, targets in zip(text[:, :-1].split(FORWARD_TOKENS, 1), text[:, 1:].split(FORWARD_TOKENS, 1)):
        hidden, state = model(tokens.to(device), state)
        logits = model.logits(hidden).transpose(1, 2)
        pieces.append(cross_entropy(logits, targets.to(device), reduction="none").double().sum(0).cpu())
    return torch.cat(pieces)


def _bits(nats: torch.Tensor, size: float) -> float | None:
    return float(nats.sum()) / log(2) / size if size else None
