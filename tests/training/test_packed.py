"""Documents packed end to end, from shards to gradients: each is as if it had been read alone."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gdn2.config import RunConfig
from gdn2.data import Shards, TokenBatches
from gdn2.data.shards import IGNORE
from gdn2.model import LanguageModel


@pytest.mark.parametrize("mixer", ["gdn2", "mamba2", "mamba3"])
def test_packed_batch_is_its_documents_read_alone(
    make_config: Callable[..., RunConfig], shards: Path, mixer: str
) -> None:
    """Operator, convolutions, window attention and rotary positions all restart; in float64 to rounding."""
    config = make_config(f"model.mixer={mixer}", "model.num_layers=4", "model.window=24")
    torch.manual_seed(0)
    model = LanguageModel(config.model).double()
    file = Shards(shards).split("train")
    batch = next(TokenBatches(file, 512, 3, seed=1, packed=True))
    assert batch.cu_seqlens is not None
    bounds = batch.cu_seqlens.tolist()
    assert len(bounds) > 5
    packed = model.loss(batch.tokens, batch.targets, batch.cu_seqlens, reduction="none")
    (packed.sum() / 1_000).backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone = []
    for start, end in pairwise(bounds):
        part = model.loss(batch.tokens[:, start:end], batch.targets[:, start:end], reduction="none")
        (part.sum() / 1_000).backward()
        alone.append(part.detach())
        # a document's last token has nothing to predict: what follows is another document, or the window's end
        ends = batch.tokens[0, end - 1] == file.meta.end_of_text
        assert not ends or batch.targets[0, end - 1] == IGNORE
    torch.testing.assert_close(packed.detach(), torch.cat(alone, dim=1), rtol=0, atol=1e-10)
    for (name, p), gradient in zip(model.named_parameters(), together):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-8, atol=1e-12, msg=name)
    plain = model.loss(batch.tokens, batch.targets, reduction="none")
    assert not torch.allclose(plain, packed)  # without boundaries documents see each other
