"""How well a model predicts held-out text: nats, perplexity, bits per byte, and the loss along the context."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from gdn2.data import Batch, TokenBatches, TokenFile
from gdn2.data.shards import IGNORE
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
    packed: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LanguageScore:
    """Score at most `tokens` targets of the file, in whole windows, one at least.

    The windows are `seq_len` targets long, apart from each other and spread evenly over the file, the same at every
    call and, with the run's `packed`, the same as in training's validation; each starts from an empty state. They may
    be of any length, in memory that does not grow with it: a window is read in pieces that hand on the state. Packed,
    every document in a window starts anew and its first token is no target, and windows are read whole. `progress` is
    told how many places are done, and of how many.

    ValueError for seq_len or tokens below 1, for a file of fewer than seq_len + 1 tokens, for a vocabulary larger than
    the model's, and for a loss that is no number.
    """
    for name, value in (("seq_len", seq_len), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected an integer >= 1")
    vocab = model.config.vocab_size
    if token_file.meta.vocab_size > vocab:
        raise ValueError(f"the text's vocabulary has {token_file.meta.vocab_size} tokens, the model's {vocab}")
    batches = TokenBatches(token_file, seq_len, max(1, FORWARD_TOKENS // seq_len), seed=0, packed=packed)
    windows = batches.spread(tokens)
    nats, counts = torch.zeros(2, seq_len, dtype=torch.float64)
    buckets = list(pairwise([0, *(2**i for i in range(4, 64) if 2**i < seq_len), seq_len]))
    size = [0.0] * len(buckets)  # bytes of text in each
    done, total = 0, sum(map(len, windows)) * seq_len
    was_training = model.training
    model.eval()
    try:
        for batch in map(batches.read, windows):
            losses = _whole(model, batch, device) if packed else _in_pieces(model, batch, device)
            targets = batch.targets.view(-1, seq_len)
            nats += losses.double().view(-1, seq_len).sum(0).cpu()
            counts += (targets != IGNORE).sum(0)
            size = [s + token_file.bytes_of(targets[:, a:b]) for s, (a, b) in zip(size, buckets)]
            done += targets.numel()
            progress(done, total)
    finally:
        model.train(was_training)
    scored = int(counts.sum())
    mean = float(nats.sum()) / scored
    if not mean < LARGEST_NATS:
        raise ValueError(f"the mean loss is {mean} nats; expected a number < {LARGEST_NATS}: the weights are broken")
    by_position = tuple(
        PositionScore(a, b, float(nats[a:b].sum() / counts[a:b].sum()), _bits(nats[a:b], bytes_))
        for (a, b), bytes_ in zip(buckets, size)
        if counts[a:b].any()  # packed, every place of a bucket may be the end of a document
    )
    return LanguageScore(mean, exp(mean), _bits(nats, sum(size)), by_position, scored)


def _whole(model: LanguageModel, batch: Batch, device: torch.device | str) -> torch.Tensor:
    """Nats of each target of a packed batch [1, B * T], 0 where there is none."""
    tokens, targets, cu_seqlens = batch.to(torch.device(device))
    return model.loss(tokens, targets, cu_seqlens, reduction="none")


def _in_pieces(model: LanguageModel, batch: Batch, device: torch.device | str) -> torch.Tensor:
    """Nats of each target [B, T]."""
    state: Any = None
    pieces = []
    for tokens, targets in zip(batch.tokens.split(FORWARD_TOKENS, 1), batch.targets.split(FORWARD_TOKENS, 1)):
        hidden, state = model(tokens.to(device), state)
        logits = model.logits(hidden).transpose(1, 2)
        pieces.append(cross_entropy(logits, targets.to(device), reduction="none"))
    return torch.cat(pieces, 1)


def _bits(nats: torch.Tensor, size: float) -> float | None:
    return float(nats.sum()) / log(2) / size if size else None
