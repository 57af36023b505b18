"""Selective deletion: to forget what one was told to, and nothing else."""

from dataclasses import dataclass

import torch

from gdn2.data.synthetic.questions import (
    ASK,
    DELETE,
    FIRST_KEY,
    NONE,
    Questions,
    ask,
    check_load,
    distinct,
    integers,
    shuffled,
    uniform,
)


@dataclass(frozen=True)
class Deletion:
    """n keys (the load) are written once each; half of them, rounded down, are deleted some time later.

        k1 v1 k2 v2 DELETE k1 k3 v3 ..  ASK k2 ASK k1    answers at k2 and k1: v2, NONE

    Every key is asked for once, in any order, deleted ones too. A deletion carries no value: nothing is to be written,
    what is there has to go.
    """

    keys: int = 256
    values: int = 256

    @property
    def vocab_size(self) -> int:
        return FIRST_KEY + self.keys + self.values

    def draw(self, load: int, batch: int, generator: torch.Generator) -> Questions:
        check_load(load, self.keys, "the number of keys")
        deleted = load // 2  # the first ones; their order in the sequence is drawn below
        keys = FIRST_KEY + distinct(batch, load, self.keys, generator)
        values = FIRST_KEY + self.keys + integers(batch, load, self.values, generator)
        written_at = uniform(batch, load, generator)
        deleted_at = written_at[:, :deleted] + (1 - written_at[:, :deleted]) * uniform(batch, deleted, generator)
        # Of equal times the writing comes first: the sort is stable.
        order = torch.cat([written_at, deleted_at], 1).argsort(stable=True, dim=1)
        writes = torch.stack([keys, values], 2)
        deletions = torch.stack([torch.full_like(keys[:, :deleted], DELETE), keys[:, :deleted]], 2)
        records = torch.cat([writes, deletions], 1)
        records = records.gather(1, order[:, :, None].expand_as(records))
        gone = torch.arange(load, device=generator.device) < deleted
        asked = shuffled(batch, load, generator)
        questions = torch.stack([torch.full_like(keys, ASK), keys], 2)
        return ask(
            records,
            questions.gather(1, asked[:, :, None].expand_as(questions)),
            torch.where(gone, NONE, values).gather(1, asked),
        )
