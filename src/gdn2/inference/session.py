"""A text that a model reads, with its state as a value: kept, forked, returned to and rolled back, all exactly.

A model state is never written in place, so a snapshot is a reference and costs nothing to take; what it holds is the
same bits for ever. A recurrence cannot be undone, though: to roll back, a session returns to the newest state that it
kept at or before the wanted length. The tokens from there on stay *unread* and go in front of whatever is read next,
in the same forward pass: rolling back costs no pass of its own.

Results are bit for bit those of any other session that read the same tokens in the same pieces; read in other pieces
(a chunk against single steps, or with a `DecodeStep` or without) they agree to rounding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn2.decoding import DecodeStep
from gdn2.inference.prefix_cache import PrefixCache
from gdn2.layers.state import check_memory_dtype, own_state, wide_memory, with_memory
from gdn2.model import LanguageModel


class Snapshot(NamedTuple):
    """Tokens and the model's state after the last of them (one row; None before the first)."""

    tokens: tuple[int, ...]
    state: Any


class Session:
    """One sequence that a model reads.

    Args:
        model: it is only read from; any number of sessions may share it.
        chunk: tokens of a forward pass at most.
        step: takes the reads of a single token, on a GPU from a CUDA graph. It has one row; sessions of one model
            may share it.
        memory_dtype: what memories are kept in between forward passes, as for `DecodeStep`; that of `step`, if any.
        keep: states kept to roll back to, one from before each of the last reads; each costs a whole state. With none
            left at or before a length, a rollback starts from the first token again.
    """

    def __init__(
        self,
        model: LanguageModel,
        chunk: int = 512,
        keep: int = 1,
        step: DecodeStep | None = None,
        memory_dtype: torch.dtype | None = None,
    ) -> None:
        check_memory_dtype(memory_dtype)
        for name, value, least in (("chunk", chunk, 1), ("keep", keep, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}; expected an integer >= {least}")
        if step is not None and (step.model is not model or step.rows != 1):
            raise ValueError(f"step has {step.rows} rows of {type(step.model)}; expected 1 row of the session's model")
        self.model, self.chunk, self.keep, self.step = model, chunk, keep, step
        self.memory_dtype = memory_dtype if step is None else step.memory_dtype
        self._tokens: list[int] = []
        self._at = _Mark(0, None)  # the tokens behind it are the unread ones
        self._marks: list[_Mark] = []

    def __len__(self) -> int:
        """Tokens so far, unread ones included."""
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens so far."""
        return tuple(self._tokens)

    @property
    def unread(self) -> int:
        """Tokens that a rollback left for the next forward pass."""
        return len(self._tokens) - self._at.length

    def read(self, tokens: Sequence[int], last: int = 1) -> Tensor:
        """Read more tokens; returns the logits [last, vocab] that follow each of the last ones.

        ValueError, with nothing read, for no tokens, for one outside the vocabulary, and for `last` beyond them.
        """
        vocab = self.model.config.vocab_size
        for token in tokens:
            if not 0 <= token < vocab:
                raise ValueError(f"token is {token}; expected an id in [0, {vocab})")
        if not 1 <= last <= len(tokens):
            raise ValueError(f"last is {last} of {len(tokens)} tokens; expected 1 to all of at least one")
        if self._at.state is not None:
            self._marks = [*self._marks, self._at][-self.keep :] if self.keep else []
        self._tokens += tokens
        return self._read(last)

    def settle(self) -> None:
        """Read what a rollback left unread, so that it is not read again after the next one."""
        if self.unread:
            self._read(0)

    @torch.inference_mode()
    def _read(self, last: int) -> Tensor:
        device = next(self.model.parameters()).device
        pieces = []
        end = len(self._tokens)
        for start in range(self._at.length, end, self.chunk):
            stop = min(start + self.chunk, end)
            if stop - start == 1 and self.step is not None and self._at.state is not None:
                logits, state = self.step.advance(self._at.state, self._tokens[start:stop], stop)
                self._at = _Mark(stop, state)
                if stop > end - last:
                    pieces.append(logits)
                continue
            tokens = torch.tensor([self._tokens[start:stop]], device=device)
            hidden, state = self.model(tokens, wide_memory(self._at.state))
            self._at = _Mark(stop, with_memory(state, self.memory_dtype))
            wanted = stop - max(start, end - last)
            if wanted > 0:
                pieces.append(self.model.logits(hidden[0, hidden.shape[1] - wanted :]))
        return torch.cat(pieces) if pieces else torch.empty(0)

    def snapshot(self) -> Snapshot:
        """The session as a value that `restore` and `PrefixCache.store` take."""
        self.settle()
        return Snapshot(self.tokens, self._at.state)

    def restore(self, snapshot: Snapshot) -> None:
        """Become what the snapshot is of; it may come from another session of the same model."""
        self._tokens = list(snapshot.tokens)
        self._at = _Mark(len(self._tokens), snapshot.state)
        self._marks = []

    def fork(self) -> "Session":
        """A session that goes on from here by itself; the two share memory, and neither sees the other."""
        twin = Session(self.model, self.chunk, self.keep, self.step, self.memory_dtype)
        twin._tokens, twin._at, twin._marks = list(self._tokens), self._at, list(self._marks)
        return twin

    def rollback(self, length: int) -> None:
        """Forget the tokens from `length` on. ValueError outside 0 to the tokens so far."""
        if not 0 <= length <= len(self._tokens):
            raise ValueError(f"length is {length}; expected 0 to the {len(self._tokens)} tokens so far")
        del self._tokens[length:]
        self._marks = [mark for mark in self._marks if mark.length <= length]
        if self._at.length > length:
            self._at = self._marks.pop() if self._marks else _Mark(0, None)


class _Mark(NamedTuple):
    length: int
    state: Any


def read_prompt(
    model: LanguageModel,
    tokens: Sequence[int],
    cache: PrefixCache | None = None,
    chunk: int = 512,
    keep: int = 1,
    step: DecodeStep | None = None,
) -> tuple[Session, Tensor]:
    """A session that has read `tokens`, and the logits [vocab] after the last one.

    From the cache comes the longest prefix that it has; what is read is put there after every chunk and at the end.
    With a cache, pieces end at multiples of `chunk` wherever they start, so that a hit there changes no bit.

    ValueError for no tokens, for one outside the vocabulary, or a cache of another block than `chunk`.
    """
    session = Session(model, chunk, keep, step)
    if cache is None:
        return session, session.read(tokens)[0]
    if cache.block != chunk:
        raise ValueError(f"chunk is {chunk} and the cache's block {cache.block}; expected the same")
    found = cache.find(tokens[:-1])  # the last token is read anyway: its logits are wanted
    if found is not None:
        session.restore(Snapshot(*found))
    logits = torch.empty(0)
    while len(session) < len(tokens) or not tokens:
        logits = session.read(tokens[len(session) : len(session) + chunk - len(session) % chunk])
        snapshot = session.snapshot()
        cache.store(snapshot.tokens, own_state(snapshot.state))
    return session, logits[0]
