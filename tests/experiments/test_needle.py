"""A needle in a text, at a size that a CPU learns in seconds: a memory finds it, also beyond the training length."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from gdn2.config import ModelConfig, OptimConfig
from gdn2.data.synthetic.questions import Questions, integers
from gdn2.training.tasks import TaskRun, train_task

TEXT = torch.tensor([byte for byte in Path(json.decoder.__file__).read_bytes() if byte < 128])
NEEDLE = 6  # bytes of "#ab=7" and its line break
SMALL = ModelConfig(vocab_size=1, d_model=64, num_layers=1, mlp_width=64, num_heads=1, key_dim=16, value_dim=16)
RUN = TaskRun((16, 32, 64), 250, 32, OptimConfig(lr=1e-2, warmup_tokens=30), test_loads=(64, 256))


@dataclass(frozen=True)
class Needle:
    """Bytes of a source file (the load), a line `#ab=7` at any place in them, and behind them `?ab=`: answer 7."""

    vocab_size: int = 128

    def draw(self, load: int, batch: int, generator: torch.Generator) -> Questions:
        hay = TEXT[integers(batch, 1, len(TEXT) - load, generator) + torch.arange(load)]
        key, value = ord("a") + integers(batch, 2, 26, generator), ord("0") + integers(batch, 1, 10, generator)
        mark, equals, line, question = (torch.full((batch, 1), ord(letter)) for letter in "#=\n?")
        needle = torch.cat([mark, key, equals, value, line], 1)
        at, place = integers(batch, 1, load + 1, generator), torch.arange(load + NEEDLE).expand(batch, -1)
        inside, behind = (place >= at) & (place < at + NEEDLE), place >= at + NEEDLE
        index = torch.where(inside, load + place - at, place - NEEDLE * behind.long())
        tokens = torch.cat([torch.cat([hay, needle], 1).gather(1, index), question, key, equals], 1)
        return Questions(tokens, torch.full((batch, 1), tokens.shape[1] - 1), value)


def test_the_question_is_whole_and_the_needle_at_any_place():
    places = set()
    for row, answer in zip(*(Needle().draw(8, 200, torch.Generator().manual_seed(0))[i].tolist() for i in (0, 2))):
        text = bytes(row).decode()
        assert len(text) == 8 + NEEDLE + 4
        assert f"#{text[-3:-1]}={chr(*answer)}\n" in text
        places.add(text.index(f"#{text[-3:-1]}="))
    assert places == set(range(9))


def test_gated_deltanet_2_finds_the_needle_four_times_beyond_its_training_length():
    """Trained on 64 bytes of text at most; a guess is right in 1 of 10. Seeds 0 to 2 found all at 64 bytes and 97, 100
    and 100 % at 256."""
    near, far = (row["accuracy"] for row in train_task(SMALL, Needle(), RUN, 0)["by_load"])
    assert near > 0.97
    assert far > 0.9


def test_attention_that_sees_16_bytes_finds_the_needles_within_them_alone():
    """Seeds 0 to 2 found 25 to 28 % at 64 bytes and 13 to 15 at 256."""
    window = ModelConfig(
        vocab_size=1, d_model=64, num_layers=1, mlp_width=64, cell=("attention",), window=16, attention_heads=2
    )
    near, far = (row["accuracy"] for row in train_task(window, Needle(), RUN, 0)["by_load"])
    assert 0.1 < near < 0.5
    assert far < 0.3
