import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gdn2.config import RunConfig, load_run
from gdn2.data import TokenBatches, prepare
from gdn2.presets import preset


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20,000 byte-level tokens of words that repeat, in documents of a few hundred."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["the", "a", "cat", "dog", "sees", "hears", "old", "new", "tree", "and", "then", "it", "was"]
    records = [{"text": " ".join(rng.choice(words, rng.integers(20, 100)))} for _ in range(80)]
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    prepare(folder / "shards", [folder / "a.jsonl"], val_share=0.15)
    return folder / "shards"


@pytest.fixture
def make_config(shards: Path) -> Callable[..., RunConfig]:
    """A run of 20 steps of a two-block hybrid that takes about a second; keyword-like overrides change it."""

    def make(*overrides: str) -> RunConfig:
        values = [
            "preset=gdn2-hybrid-tiny", "model.num_layers=2", "model.d_model=16", "model.mlp_width=16",
            "model.num_heads=1", "model.key_dim=8", "model.value_dim=8", "model.attention_heads=1", "model.window=16",
            f"data.path={shards}", "data.seq_len=32", "train.micro_batch=2", "train.batch_tokens=128",
            "train.tokens=2560", "train.log_every=3", "train.eval_every=10", "train.eval_tokens=256",
            "train.checkpoint_every=10", "train.device=cpu", "optim.lr=1e-2", "optim.warmup_tokens=256", "seed=7",
        ]  # fmt: skip
        return load_run(None, [*values, *overrides], preset)

    return make


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Path], list[dict[str, Any]]]:
    def read(run_dir: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def on_batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[], None]], None]]:
    """Call something when the n-th micro-batch is drawn."""
    plain = TokenBatches.__next__

    def register(number: int, action: Callable[[], None]) -> None:
        drawn = 0

        def draw(self: TokenBatches) -> Any:
            nonlocal drawn
            drawn += 1
            if drawn == number:
                action()
            return plain(self)

        monkeypatch.setattr(TokenBatches, "__next__", draw)

    yield register
    monkeypatch.setattr(TokenBatches, "__next__", plain)
