"""The configurations in examples/ say what they are meant to."""

from pathlib import Path

import pytest
import torch

from gdn2.config import load_run
from gdn2.info import describe
from gdn2.model import LanguageModel
from gdn2.presets import preset
from gdn2.training.optim import build_optimizer, learning_rate

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_loads(path: Path) -> None:
    assert load_run(path, [], preset).steps > 0


def test_paper_is_its_recipe() -> None:
    """Section 4 of the paper's recipe: 100B tokens, length 4,096, 0.5M tokens a batch, AdamW, cosine to a tenth."""
    config = load_run(EXAMPLES / "paper.yaml", [], preset)
    assert describe(config.model).block_parameters == 1_302_638_112
    assert config.train.batch_tokens == 2**19 == 128 * config.data.seq_len
    assert config.steps == 190_735 == -(-100_000_000_000 // 2**19)
    total = config.steps * config.train.batch_tokens
    rates = {tokens: learning_rate(config.optim, tokens, total) for tokens in (10**9 // 2, 10**9, total)}
    assert rates == {10**9 // 2: 2e-4, 10**9: 4e-4, total: pytest.approx(4e-5)}
    with torch.device("meta"):
        model = LanguageModel(config.model)
    optimizer = build_optimizer(model, config.optim)
    decay, plain = optimizer.param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decay["betas"] == plain["betas"] == (0.9, 0.95)
    assert config.optim.clip == 1.0
    named = {id(p): name for name, p in model.named_parameters()}
    exempt = {named[id(p)].rsplit(".", 2)[-1] for p in plain["params"]}
    assert exempt == {"weight", "bias", "rate", "delta"}
    assert all(p.ndim == 1 for p in plain["params"])
    hybrid = load_run(EXAMPLES / "paper.yaml", ["preset=gdn2-hybrid-1.3b"], preset)
    assert describe(hybrid.model).block_parameters == 1_300_314_384
