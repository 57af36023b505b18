"""Greedy text faster: a cheap draft proposes tokens, one forward pass checks them all, and the wrong ones go back.

The model reads its last token and the proposals as one chunk. Every proposal that is what the model itself would have
said stays; the first other one is replaced by the model's own word, and the state is rolled back to there. So the text
is the model's own greedy text. Only where two tokens are likeliest to within rounding may a chunk choose the other one
than single steps would have.
"""

from array import array
from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gdn2.decoding import DecodeStep
from gdn2.inference.prefix_cache import PrefixCache
from gdn2.inference.session import Session, read_prompt
from gdn2.model import LanguageModel


class Draft(Protocol):
    """Whatever guesses how a text goes on."""

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        """At most n tokens, possibly none, that may follow `tokens`."""


class PromptLookup:
    """Proposes what followed the last time that the text's newest tokens were in it: `longest` of them, else fewer."""

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest is {shortest} and longest {longest}; expected 1 <= shortest <= longest")
        self.longest, self.shortest = longest, shortest

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        text = array("q", tokens)
        before = text[:-1].tobytes()
        for size in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            pattern = text[-size:].tobytes()
            at = before.rfind(pattern)
            while at >= 0 and at % text.itemsize:  # bytes of two tokens that look like one
                at = before.rfind(pattern, 0, at + len(pattern) - 1)
            if at >= 0:
                start = at // text.itemsize + size
                return text[start : start + n].tolist()
        return []


class DraftModel:
    """Proposes the greedy text of another, smaller model with the same vocabulary."""

    def __init__(self, model: LanguageModel, chunk: int = 512) -> None:
        self._session = Session(model, chunk, step=DecodeStep(model, 1))

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        session = self._session
        common = min(len(session), len(tokens) - 1)
        if session.tokens[:common] != tuple(tokens[:common]):
            common = 0
        session.rollback(common)
        logits = session.read(tokens[common:])
        trial = session.fork()
        proposal: list[int] = []
        for _ in range(n):
            if proposal:
                logits = trial.read(proposal[-1:])
            proposal += _likeliest(logits)
        return proposal


class Round(NamedTuple):
    """New tokens of one forward pass, at least one, and how many had been proposed for it."""

    tokens: list[int]
    proposed: int


def speculate(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    draft: Draft,
    lookahead: int = 8,
    stop_tokens: Sequence[int] = (),
    cache: PrefixCache | None = None,
    chunk: int = 512,
) -> Generator[Round, None, None]:
    """Continue a prompt greedily; yields the tokens as forward passes decide them.

    Args:
        model: the model whose text it is.
        prompt: token ids, one or more.
        max_new_tokens: new tokens at most.
        draft: proposes at most `lookahead` tokens a round.
        stop_tokens: ids that end the text; they are not yielded.
        cache, chunk: as for `read_prompt`.

    Raises:
        ValueError: an argument out of range (at the call), a proposal outside the vocabulary, or logits that are NaN.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("lookahead", lookahead), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected an integer >= 1")
    vocab = model.config.vocab_size
    for name, tokens in (("prompt", prompt), ("stop_tokens", stop_tokens)):
        for token in tokens:
            if not 0 <= token < vocab:
                raise ValueError(f"{name}: token is {token}; expected an id in [0, {vocab})")
    if not prompt:
        raise ValueError("prompt is empty; expected at least one token, such as the end-of-text token")
    return _rounds(model, prompt, max_new_tokens, draft, lookahead, frozenset(stop_tokens), cache, chunk)


def _rounds(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    draft: Draft,
    lookahead: int,
    stop_tokens: frozenset[int],
    cache: PrefixCache | None,
    chunk: int,
) -> Generator[Round, None, None]:
    session, logits = read_prompt(model, prompt, cache, chunk, step=DecodeStep(model, 1))
    text = [*prompt, *_likeliest(logits[None])]
    new, proposed = text[-1:], 0
    while True:
        left = max_new_tokens - (len(text) - len(new) - len(prompt))
        stop = next((i for i, token in enumerate(new) if token in stop_tokens), len(new))
        if new[: min(stop, left)]:
            yield Round(new[: min(stop, left)], proposed)
        if stop < len(new) or len(new) >= left:
            return
        guess = draft.propose(text, min(lookahead, left - len(new)))
        if session.unread > lookahead:  # read once and for all, or a poor draft would make the passes ever longer
            session.settle()
        own = _likeliest(session.read([text[-1], *guess], last=1 + len(guess)))
        right = next((i for i, token in enumerate(guess) if token != own[i]), len(guess))
        session.rollback(len(text) + right)
        new, proposed = own[: right + 1], len(guess)
        text += new


def _likeliest(logits: Tensor) -> list[int]:
    """[n, vocab] -> n token ids."""
    if bool(torch.isnan(logits).any()):
        raise ValueError("a logit is nan; expected numbers; the model's weights are broken")
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens
