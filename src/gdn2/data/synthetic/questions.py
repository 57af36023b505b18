"""What every synthetic task gives, and the draws they share. Nothing here waits for the device."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ASK, DELETE, NONE = 0, 1, 2  # tokens of the tasks with records: a question, a deletion, "there is no value"
FIRST_KEY = 3


class Questions(NamedTuple):
    """tokens [B, T]; at each of positions [B, n], places in the sequence, the model is to answer with answers [B, n].

    All int64. The answer itself never follows in the tokens.
    """

    tokens: Tensor
    positions: Tensor
    answers: Tensor


class SyntheticTask(Protocol):
    """A family of tasks of growing load. Tokens are below `vocab_size`."""

    @property
    def vocab_size(self) -> int: ...

    def draw(self, load: int, batch: int, generator: torch.Generator) -> Questions:
        """`batch` sequences on the generator's device. ValueError for a load that the task's sizes do not allow."""


def check_load(load: int, most: int, why: str) -> None:
    if not 1 <= load <= most:
        raise ValueError(f"load is {load}; expected 1 to {most}, {why}")


def uniform(batch: int, n: int, generator: torch.Generator) -> Tensor:
    """[batch, n] float32 in [0, 1)."""
    return torch.rand(batch, n, generator=generator, device=generator.device)


def integers(batch: int, n: int, choices: int, generator: torch.Generator) -> Tensor:
    """[batch, n] int64 in [0, choices), with repetition."""
    return torch.randint(choices, (batch, n), generator=generator, device=generator.device)


def distinct(batch: int, n: int, choices: int, generator: torch.Generator) -> Tensor:
    """[batch, n] int64 in [0, choices), in random order, none twice in a row of the batch."""
    return uniform(batch, choices, generator).topk(n, 1).indices


def shuffled(batch: int, n: int, generator: torch.Generator) -> Tensor:
    """[batch, n]: each row an order of 0 .. n - 1."""
    return uniform(batch, n, generator).argsort(1)


def ask(records: Tensor, questions: Tensor, answers: Tensor) -> Questions:
    """Records [B, R, width], then the questions [B, n, m] asked in turn; each is answered at its last token."""
    batch, n, m = questions.shape
    written = records.flatten(1)
    tokens = torch.cat([written, questions.flatten(1)], 1)
    last = written.shape[1] + m * torch.arange(1, n + 1, device=tokens.device) - 1
    return Questions(tokens, last.expand(batch, n), answers)
