"""Multi-query associative recall (Zoology, arXiv 2312.04927)."""

from dataclasses import dataclass

import torch

from gdn2.data.synthetic.questions import Questions, check_load, distinct, integers, uniform


@dataclass(frozen=True)
class MQAR:
    """Key-value pairs, then every key once more, to be answered with its value.

        k1 v1 k2 v2 .. kn vn  . . k2 . . . k1 . .        answers at k2 and k1: v2, v1

    n pairs (the load) fill the first 2n tokens. Behind them are (length - 2n) / 2 places for a question, two tokens
    apart; each key takes one, drawn with weights x^(power - 1), x = 1, 2, ..., so that most gaps are short and some
    long, as long as there are more places than keys. Keys are tokens 1 .. vocab_size / 2 - 1, values the upper half,
    drawn anew for each sequence and none twice. With `noise` every other place holds a random token of the whole
    vocabulary, else token 0.

    The vocabulary of 8,192, power 0.01 and random tokens are Zoology's defaults, which leaves the length open (its
    Figure 2 has 64 tokens for 4 pairs to 512 for 64). Here it is the shortest that holds all questions, 4n tokens, but
    64 at least: from 16 pairs on every place is taken, in an order that any power leaves uniform.
    """

    vocab_size: int = 8_192
    shortest: int = 64
    power: float = 0.01
    noise: bool = True

    def length(self, load: int) -> int:
        """Tokens of a sequence with `load` pairs."""
        return max(self.shortest, 4 * load)

    def draw(self, load: int, batch: int, generator: torch.Generator) -> Questions:
        half = self.vocab_size // 2
        check_load(load, half - 1, f"keys are half of the {self.vocab_size} tokens")
        length, written = self.length(load), 2 * load
        keys = 1 + distinct(batch, load, half - 1, generator)
        values = half + distinct(batch, load, self.vocab_size - half, generator)
        if self.noise:
            tokens = integers(batch, length, self.vocab_size, generator)
        else:
            tokens = torch.zeros(batch, length, dtype=torch.int64, device=generator.device)
        tokens[:, 0:written:2], tokens[:, 1:written:2] = keys, values
        # The n largest of log(weight) + Gumbel noise are n draws without replacement.
        places = torch.arange(1, (length - written) // 2 + 1, device=generator.device)
        gumbel = -torch.log(-torch.log(uniform(batch, len(places), generator).clamp(1e-20, 1 - 1e-7)))
        gaps = ((self.power - 1) * places.log() + gumbel).topk(load, 1).indices
        gaps = gaps.gather(1, uniform(batch, load, generator).argsort(1))  # in any order, not the likeliest first
        positions = written + 2 * gaps
        return Questions(tokens.scatter(1, positions, keys), positions, values)
