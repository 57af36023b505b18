"""The gradients of one optimizer step: its micro-batches, over all ranks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from gdn2.data import Batch, TokenFile
from gdn2.data.shards import IGNORE
from gdn2.model import LanguageModel
from gdn2.training.distributed import Ranks
from gdn2.training.sharding import begin_micro_batch, finish_gradients


def accumulate_gradients(
    model: LanguageModel,
    batches: Sequence[Batch],
    token_file: TokenFile,
    ranks: Ranks,
    device: torch.device,
    autocast: AbstractContextManager,
) -> tuple[float, int, float]:
    """Add the gradients of the step's mean loss, over the targets of all ranks, to those of the model.

    `batches` are this rank's. Returns sums over all ranks: nats, targets, and the bytes of text they stand for.
    """
    counts = [(count_targets(part), token_file.bytes_of(part.targets)) for part in map(ranks.own_tokens, batches)]
    all_targets, text_bytes = ranks.sum([sum(count) for count in zip(*counts)])
    targets, nats = int(all_targets), torch.zeros((), dtype=torch.float64, device=device)
    for i, batch in enumerate(map(ranks.own_tokens, batches), start=1):
        begin_micro_batch(model, i == len(batches), ranks)
        with autocast:
            on_device = batch.to(device)
            loss = model.loss(on_device.tokens, on_device.targets, cu_seqlens=on_device.cu_seqlens)
        # Each rank's are a share of one sum, and ranks average.
        (loss * (ranks.token_ranks * count_targets(batch) / max(targets, 1))).backward()
        nats += loss.detach().double() * count_targets(batch)
    finish_gradients(model, ranks)
    (all_nats,) = ranks.sum([float(nats)])  # read once a step: the host runs ahead of the GPU until here
    return all_nats, targets, text_bytes


def count_targets(batch: Batch) -> int:
    return int((batch.targets != IGNORE).sum())
