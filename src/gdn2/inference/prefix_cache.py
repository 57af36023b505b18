"""Model states kept by the tokens that led to them, so that a prefix common to many prompts is read once.

A state is found under the longest stored prefix of a prompt. Prefixes are named by a chain of digests over blocks of
tokens plus the tokens after the last whole block, so that looking one up reads the prompt once, whatever is stored.
The least recently used states make room for new ones. A cache serves one model: another one's states, or those from
before its weights changed, are wrong for it (`clear`).
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from gdn2.layers.state import own_state, state_bytes


class Prefix(NamedTuple):
    """Digest of the whole blocks, and the tokens after them, fewer than a block."""

    blocks: bytes
    rest: tuple[int, ...]


class PrefixCache:
    """States of at most `capacity` bytes together.

    Args:
        capacity: bytes of states; their tokens are not kept.
        block: tokens per link of the chain. Prompts read in chunks of the same size share states after whole chunks.

    Raises:
        ValueError: capacity below 0 or block below 1.
    """

    def __init__(self, capacity: int, block: int = 512) -> None:
        for name, value, least in (("capacity", capacity, 0), ("block", block, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; expected an integer >= {least}")
        self.capacity, self.block = capacity, block
        self.bytes = 0
        self._states: OrderedDict[Prefix, Any] = OrderedDict()  # least recently used first
        self._rests: dict[bytes, dict[tuple[int, ...], None]] = {}

    def __len__(self) -> int:
        """States held."""
        return len(self._states)

    def store(self, tokens: Sequence[int], state: Any) -> None:
        """Keep the state [one row] after `tokens`; none after no tokens, and none larger than the whole cache."""
        if not tokens or (size := state_bytes(state)) > self.capacity:
            return
        state = own_state(state)
        *_, prefix = self._prefixes(tokens)
        if prefix in self._states:
            self._drop(prefix)
        while self.bytes + size > self.capacity:
            self._drop(next(iter(self._states)))
        self._states[prefix] = state
        self._rests.setdefault(prefix.blocks, {})[prefix.rest] = None
        self.bytes += size

    def find(self, tokens: Sequence[int]) -> tuple[tuple[int, ...], Any] | None:
        """The longest stored prefix of `tokens`, the whole included, and its state; None when there is none."""
        best, length = None, 0
        for index, whole in enumerate(self._prefixes(tokens)):
            start = index * self.block
            for rest in self._rests.get(whole.blocks, ()):
                if start + len(rest) > length and rest == tuple(tokens[start : start + len(rest)]):
                    best, length = Prefix(whole.blocks, rest), start + len(rest)
        if best is None:
            return None
        self._states.move_to_end(best)
        return tuple(tokens[:length]), self._states[best]

    def clear(self) -> None:
        """Forget everything."""
        self._states.clear()
        self._rests.clear()
        self.bytes = 0

    def _prefixes(self, tokens: Sequence[int]) -> Iterator[Prefix]:
        """Each number of whole blocks, ascending, with the tokens after them, fewer than a block."""
        digest = b""
        for start in range(0, len(tokens) + 1, self.block):
            part = tuple(tokens[start : start + self.block])
            yield Prefix(digest, part if len(part) < self.block else ())
            digest = blake2b(digest + array("q", part).tobytes(), digest_size=32).digest()

    def _drop(self, prefix: Prefix) -> None:
        self.bytes -= state_bytes(self._states.pop(prefix))
        rests = self._rests[prefix.blocks]
        del rests[prefix.rest]
        if not rests:
            del self._rests[prefix.blocks]
