"""Keys of two parts among distractors that share one of them: recall that needs both parts of a key."""

from dataclasses import dataclass

import torch

from gdn2.data.synthetic.questions import ASK, FIRST_KEY, Questions, ask, check_load, distinct, integers, shuffled


@dataclass(frozen=True)
class Sharing:
    """Keys are two tokens (a, b). Beside each of n keys (the load) stand `distractors` others that share a or b.

        a1 b1 v1  a1 b7 v2  a5 b1 v3 ..  ASK a1 b1       answer at b1: v1

    All are written once, in any order; the n keys are asked for, and no distractor. Distractors keep a and b in turn,
    a first; their other part belongs to no other key. With three of them, who goes by a alone guesses among three
    values, who goes by b alone among two. Nothing is written over: a memory that adds up, with the sum of its parts as
    a key, tells them apart as far as it has room.
    """

    parts: int = 512
    values: int = 256
    distractors: int = 3

    @property
    def vocab_size(self) -> int:
        return FIRST_KEY + 2 * self.parts + self.values

    def draw(self, load: int, batch: int, generator: torch.Generator) -> Questions:
        kept_a = (self.distractors + 1) // 2  # distractors that share a, and need a b of their own
        most = self.parts // (1 + kept_a)
        check_load(load, most, f"{self.parts} parts for {self.distractors} distractors each")
        kept_b = self.distractors - kept_a
        first = FIRST_KEY + distinct(batch, load * (1 + kept_b), self.parts, generator)
        second = FIRST_KEY + self.parts + distinct(batch, load * (1 + kept_a), self.parts, generator)
        a, b = first[:, :load], second[:, :load]
        firsts = torch.cat([a, a.repeat(1, kept_a), first[:, load:]], 1)
        seconds = torch.cat([b, second[:, load:], b.repeat(1, kept_b)], 1)
        records = load * (1 + self.distractors)
        values = FIRST_KEY + 2 * self.parts + integers(batch, records, self.values, generator)
        order = shuffled(batch, records, generator)
        asked = shuffled(batch, load, generator)
        questions = torch.stack([torch.full_like(a, ASK), a.gather(1, asked), b.gather(1, asked)], 2)
        written = torch.stack([x.gather(1, order) for x in (firsts, seconds, values)], 2)
        return ask(written, questions, values.gather(1, asked))
