"""Text from a language model: prefill by chunks, then single-token steps on an explicit state.

`generate` works on token ids, `generate_text` on strings. The state of a recurrent block, and of attention with a
window, has one size whatever was read before, so memory depends on neither the prompt's length nor the text's.
"""

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol

import torch
from torch import Tensor

from gdn2.decoding import DecodeStep, likeliest_tokens
from gdn2.layers.state import AttentionState, check_memory_dtype, join_states, state_rows
from gdn2.model import LanguageModel

WORTH_A_GRAPH = 16  # tokens; to capture a CUDA graph takes about as long as a few steps without one


class TextStream(Protocol):
    """Token ids in, whole characters out."""

    def feed(self, token: int) -> str: ...
    def flush(self) -> str: ...


class TextTokenizer(Protocol):
    """What `generate_text` asks of a tokenizer; those of `gdn2.data` have it."""

    @property
    def end_of_text(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def stream(self) -> TextStream: ...


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_tokens: Sequence[int] = (),
    chunk: int = 512,
    memory_dtype: torch.dtype | None = None,
) -> Generator[list[int | None], None, None]:
    """Continue every prompt; yields one list per step, one token id per prompt, None once that prompt has stopped.

    Args:
        model: the model; it is in evaluation mode while the iterator lives and goes back to its mode afterwards.
        prompts: token ids, one or more per prompt; lengths may differ. A row's text does not depend on the others.
        max_new_tokens: steps at most; iteration ends sooner when every prompt has stopped.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens; 0 means all.
        top_p: sample among the likeliest tokens that together reach this probability, in (0, 1].
        seed: row i draws from its own generator, seeded with seed + i; None takes a fresh seed.
        stop_tokens: ids that end a row; they are not yielded.
        chunk: prompt tokens read at once.
        memory_dtype: what recurrent memories are kept in from token to token, as for `DecodeStep`.

    Raises:
        ValueError: an argument out of range (at the call), or logits that are NaN (while iterating).
    """
    vocab = model.config.vocab_size
    _require(len(prompts) >= 1, "prompts", prompts, "at least one prompt")
    for row, prompt in enumerate(prompts):
        _require(len(prompt) >= 1, f"prompts[{row}]", prompt, "at least one token, such as the end-of-text token")
        for token in prompt:
            _require(0 <= token < vocab, f"prompts[{row}]: token", token, f"an id in [0, {vocab})")
    for token in stop_tokens:
        _require(0 <= token < vocab, "stop_tokens: token", token, f"an id in [0, {vocab})")
    _require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "an integer >= 1")
    _require(0 <= temperature < float("inf"), "temperature", temperature, "a number >= 0")
    _require(top_k >= 0, "top_k", top_k, "an integer >= 0")
    _require(0 < top_p <= 1, "top_p", top_p, "a number in (0, 1]")
    _require(seed is None or 0 <= seed < 2**63, "seed", seed, "an integer in [0, 2**63), or None")
    _require(chunk >= 1, "chunk", chunk, "an integer >= 1")
    check_memory_dtype(memory_dtype)
    if seed is None:
        seed = torch.Generator().seed() % 2**63

    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]

    def choose(logits: Tensor) -> Tensor:
        # Drawn on the CPU, so that a seed gives one text on every device.
        uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        return sample_tokens(logits, temperature, top_k, top_p, uniform.to(logits.device))

    greedy = temperature == 0
    chooser = None if greedy else choose
    return _tokens(model, prompts, max_new_tokens, chooser, frozenset(stop_tokens), chunk, memory_dtype)


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


@torch.inference_mode()
def _tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor] | None,
    stop_tokens: frozenset[int],
    chunk: int,
    memory_dtype: torch.dtype | None,
) -> Generator[list[int | None], None, None]:
    """The tokens of `generate`; `choose` takes logits [N, vocab], None takes the likeliest tokens."""
    running = set(range(len(prompts)))
    was_training = model.training
    model.eval()
    try:
        hidden, states = _prefill(model, prompts, chunk)
        groups: list[tuple[list[int], DecodeStep]] = []
        logits = model.logits(hidden)
        chosen = likeliest_tokens(logits)
        for made in range(max_new_tokens):
            if choose is not None:
                chosen = torch.where(chosen < 0, chosen, choose(logits))
            tokens = chosen.tolist()
            _require(min(tokens) >= 0, "a logit", float("nan"), "numbers; the model's weights are broken")
            running -= {row for row in running if tokens[row] in stop_tokens}
            if not running:
                return
            yield [token if row in running else None for row, token in enumerate(tokens)]
            if made == max_new_tokens - 1:
                return
            if made == 0:
                alike = _alike(states, _shape)
                # Training goes on with the weights where they are, and few tokens are not worth a graph.
                graph = None if max_new_tokens >= WORTH_A_GRAPH and not was_training else False
                groups = [(rows, _step_from(model, [states[r] for r in rows], graph, memory_dtype)) for rows in alike]
                del states, hidden
            for rows, step in groups:
                step.make_room(len(prompts[rows[0]]) + made + 1)
                if len(groups) == 1:
                    logits, chosen = step(chosen), step.likeliest
                else:
                    logits[rows], chosen[rows] = step(chosen[rows]), step.likeliest
    finally:
        model.train(was_training)


def _step_from(
    model: LanguageModel, states: Sequence[Any], graph: bool | None, memory_dtype: torch.dtype | None
) -> DecodeStep:
    """A step whose rows go on from the given states, which are of one shape."""
    step = DecodeStep(model, len(states), graph, memory_dtype)
    state = join_states(states)
    step.make_room(max((block.keys.shape[1] for block in state if isinstance(block, AttentionState)), default=0))
    step.load(state)
    return step


def _prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], chunk: int) -> tuple[Tensor, list[Any]]:
    """Read every prompt; returns the hidden states of their last tokens [N, d_model] and one state per prompt.

    All prompts advance together, `chunk` tokens a round. Only pieces of one length share a forward pass: nothing is
    padded, so each row is what it would be alone.
    """
    device = next(model.parameters()).device
    states: list[Any] = [None] * len(prompts)
    last: list[Any] = [None] * len(prompts)
    for start in range(0, max(map(len, prompts)), chunk):
        pieces = [prompt[start : start + chunk] for prompt in prompts]
        for rows in _alike(pieces, len):
            if not pieces[rows[0]]:
                continue
            tokens = torch.tensor([list(pieces[r]) for r in rows], device=device)
            hidden, state = model(tokens, None if start == 0 else join_states([states[r] for r in rows]))
            for i, row in enumerate(rows):
                last[row], states[row] = hidden[i, -1], state_rows(state, slice(i, i + 1))
    return torch.stack(last), states


def _alike(items: Sequence[Any], key: Callable[[Any], Hashable]) -> list[list[int]]:
    """The indices of `items`, grouped by equal key."""
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(key(item), []).append(index)
    return list(groups.values())


def _shape(state: Any) -> Hashable:
    """What must agree for states to be joined; only full attention's keys and values grow with the text."""
    return tuple(tensor.shape for block in state for tensor in block)


def sample_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> Tensor:
    """Token ids [N] from logits [N, vocab], by inverting the cumulative distribution at `uniform` [N] in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    # float64: in float32 the cumulative sum over a large vocabulary cannot tell unlikely tokens apart.
    ordered, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    probabilities = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    cumulative = probabilities.masked_fill(before >= top_p, 0.0).cumsum(-1)
    # right=True: the first entry above the drawn height, so an entry of probability 0 is never taken.
    rank = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return ids.gather(-1, rank.clamp(max=logits.shape[1] - 1)).squeeze(-1)  # beyond the last only with NaN


class StopStrings:
    """Lets text through up to the first stop string, which is dropped; holds back what may yet become one.

    The result depends on the text alone, not on the pieces in which it comes. `stopped` says that one was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        _require(all(stops), "stop strings", list(stops), "strings that are not empty")
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """The part of the text so far, not yet returned, that is certain to come before any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:  # the one completed first; of those, the one that began first
            self.stopped = True
            cut = min(found)[1]
        else:
            starts = range(len(text))
            cut = next((i for i in starts if any(stop.startswith(text[i:]) for stop in self.stops)), len(text))
        self._held = "" if self.stopped else text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def generate_text(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_strings: Sequence[str] = (),
    memory_dtype: torch.dtype | None = None,
) -> Iterator[list[str]]:
    """Continue every prompt; yields one list per step, for each prompt its new text, possibly empty.

    A row ends at the end-of-text token or before the first of `stop_strings`, wherever the borders of tokens lie. An
    empty prompt starts from the end-of-text token. The other arguments, and the errors, are those of `generate`.
    """
    ids = [tokenizer.encode(prompt) or [tokenizer.end_of_text] for prompt in prompts]
    end = [tokenizer.end_of_text]
    stops = [StopStrings(stop_strings) for _ in prompts]
    steps = generate(model, ids, max_new_tokens, temperature, top_k, top_p, seed, end, memory_dtype=memory_dtype)
    return _texts(steps, [tokenizer.stream() for _ in prompts], stops)


def _texts(
    steps: Generator[list[int | None], None, None], streams: Sequence[TextStream], stops: Sequence[StopStrings]
) -> Iterator[list[str]]:
    with closing(steps):  # the model leaves evaluation mode even where the reader stops early
        for tokens in steps:
            yield [
                "" if token is None else stop.feed(stream.feed(token))
                for token, stream, stop in zip(tokens, streams, stops)
            ]
            if all(token is None or stop.stopped for token, stop in zip(tokens, stops)):
                break
    yield [stop.feed(stream.flush()) + stop.flush() for stream, stop in zip(streams, stops)]
