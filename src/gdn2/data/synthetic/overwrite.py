"""The same keys written again and again: what a memory without erasure adds up."""

from dataclasses import dataclass

import torch

from gdn2.data.synthetic.questions import ASK, FIRST_KEY, Questions, ask, check_load, distinct, integers, shuffled


@dataclass(frozen=True)
class Overwrite:
    """n keys (the load) are each written `rewrites` times with new values, in any order; the latest value counts.

        k1 v1 k2 v2 k1 v3 k2 v4 ..  ASK k2 ASK k1        answers at k2 and k1: v4, v3

    Every key is asked for once, in any order. A memory that only adds has to tell the latest of `rewrites` values apart
    from all earlier ones; one that erases before it writes holds one value per key.
    """

    keys: int = 256
    values: int = 256
    rewrites: int = 4

    @property
    def vocab_size(self) -> int:
        return FIRST_KEY + self.keys + self.values

    def draw(self, load: int, batch: int, generator: torch.Generator) -> Questions:
        check_load(load, self.keys, "the number of keys")
        writes = load * self.rewrites
        keys = FIRST_KEY + distinct(batch, load, self.keys, generator)
        which = shuffled(batch, writes, generator) % load  # the key that each record writes
        values = FIRST_KEY + self.keys + integers(batch, writes, self.values, generator)
        at = torch.arange(writes, device=generator.device).expand(batch, writes)
        latest = torch.zeros_like(keys).scatter_reduce(1, which, at, "amax", include_self=False)
        order = shuffled(batch, load, generator)
        asked = keys.gather(1, order)
        return ask(
            torch.stack([keys.gather(1, which), values], 2),
            torch.stack([torch.full_like(asked, ASK), asked], 2),
            values.gather(1, latest.gather(1, order)),
        )
