"""State tracking: what a transition with eigenvalues in [0, 1] alone cannot do (arXiv 2411.12537)."""

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import torch
from torch import Tensor

from gdn2.data.synthetic.questions import Questions, check_load, integers

LONGEST = 1 << 20


@dataclass(frozen=True)
class Parity:
    """n random bits (the load); at each the parity of all so far. Tokens and answers are 0 and 1."""

    vocab_size: int = 2

    def draw(self, load: int, batch: int, generator: torch.Generator) -> Questions:
        check_load(load, LONGEST, "bits")
        bits = integers(batch, load, 2, generator)
        return _everywhere(bits, bits.cumsum(1) % 2)


@dataclass(frozen=True)
class S5:
    """n permutations of five things (the load); at each the product of all so far, the latest applied last.

    Tokens and answers are the 120 permutations in lexicographic order. With `swaps` only the identity and the ten
    exchanges of two things are drawn; an exchange is one reflection.
    """

    swaps: bool = False

    @property
    def vocab_size(self) -> int:
        return 120

    def draw(self, load: int, batch: int, generator: torch.Generator) -> Questions:
        check_load(load, LONGEST, "permutations")
        table, exchanges = _products(generator.device)
        if self.swaps:
            tokens = exchanges[integers(batch, load, len(exchanges), generator)]
        else:
            tokens = integers(batch, load, 120, generator)
        product, shift = tokens, 1
        while shift < load:  # products of 1, 2, 4, ... tokens: a scan in log(n) steps
            product = torch.cat([product[:, :shift], table[product[:, :-shift], product[:, shift:]]], 1)
            shift *= 2
        return _everywhere(tokens, product)


@cache
def _products(device: torch.device) -> tuple[Tensor, Tensor]:
    """table [120, 120]: the index of "first the one, then the other"; and the indices that move two things or none.

    Kept on the device: a copy from the host would wait for it, and could not be recorded in a graph.
    """
    elements = list(permutations(range(5)))
    index = {p: i for i, p in enumerate(elements)}
    table = [[index[tuple(second[x] for x in first)] for second in elements] for first in elements]
    moved = [sum(x != i for i, x in enumerate(p)) for p in elements]
    exchanges = [i for i, n in enumerate(moved) if n in (0, 2)]
    return torch.tensor(table, device=device), torch.tensor(exchanges, device=device)


def _everywhere(tokens: Tensor, answers: Tensor) -> Questions:
    return Questions(tokens, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens), answers)
