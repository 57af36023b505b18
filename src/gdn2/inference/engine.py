"""Many requests at a time: prompts by chunks, then one step for all of them together, over a fixed number of slots.

A request waits, has its prompt read (one chunk of one prompt between two steps, so that a long prompt does not stall
the texts that run), and takes a slot: a row of the engine's state. Every step reads one token in each slot, also in
those that are free, so that shapes never change; a row's result does not depend on the others, nor does its text: it
draws from a generator of its own. With its seed a request says what `generate` says for it alone.

Memory is the slots' state, whatever is read; with full attention a slot grows with the longest text that runs.

The engine is driven by `step` and belongs to one thread.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gdn2.decoding import DecodeStep, likeliest_tokens
from gdn2.generate import StopStrings, TextStream, sample_tokens
from gdn2.inference.prefix_cache import PrefixCache
from gdn2.inference.session import Session, Snapshot
from gdn2.model import LanguageModel


class StreamTokenizer(Protocol):
    """What the engine asks of a tokenizer; those of `gdn2.data` have it."""

    @property
    def end_of_text(self) -> int: ...
    def stream(self) -> TextStream: ...


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Args:
        prompt: token ids, one or more.
        max_new_tokens: new tokens at most.
        temperature, top_k, top_p: as for `generate`; temperature 0 takes the likeliest token.
        seed: of this request's draws; None takes a fresh one.
        stop_strings: texts before which to end, wherever the borders of tokens lie.
        stop_tokens: ids that end the text besides end-of-text; they are not part of it.
        logprobs: likeliest alternatives to report with each token; None reports no log-probabilities at all.
        prompt_logprobs: as many alternatives for each token of the prompt from the second on. The whole prompt is then
            read, whatever a cache has of it.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_strings: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class TokenScore(NamedTuple):
    """Log-probability in nats of the chosen token under the model (at temperature 1), and the likeliest tokens'."""

    logprob: float
    top: dict[int, float]


class Event(NamedTuple):
    """What a step brought a request.

    token is its new token, or None when it only ended; text is what became certain, whole characters of valid UTF-8
    before any stop string; score is that of its token, or of the token that ended it; finish is None while it runs,
    then "stop" (end of text, a stop token or string), "length" or "cancelled". The first event that is not "cancelled"
    has the scores of the prompt.
    """

    request: int
    token: int | None
    text: str
    score: TokenScore | None
    finish: str | None
    prompt_scores: tuple[TokenScore, ...] = ()


class Completion(NamedTuple):
    """A finished request: all of its events together."""

    text: str
    tokens: list[int]
    scores: list[TokenScore]
    finish: str


@dataclass(eq=False)
class _Running:
    """A request from its submission to its end."""

    id: int
    request: Request
    generator: torch.Generator
    ends: frozenset[int]
    stream: TextStream
    stop: StopStrings
    session: Session | None = None  # while its prompt is read
    new: list[int] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)


class Engine:
    """Runs requests.

    Args:
        model: in evaluation mode.
        tokenizer: whose end-of-text token ends a text, and whose stream turns tokens into characters.
        slots: texts that run at a time; more wait their turn, first come first served.
        chunk: prompt tokens read between two steps.
        cache: states of prefixes, found and kept for prompts and for what followed them; its block is `chunk`.
        graph, memory_dtype: whether steps come from a CUDA graph, and what memories are kept in; see `DecodeStep`.

    Raises:
        ValueError: slots or chunk below 1, a cache of another block, or what `DecodeStep` refuses.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: StreamTokenizer,
        slots: int = 8,
        chunk: int = 512,
        cache: PrefixCache | None = None,
        graph: bool | None = None,
        memory_dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected an integer >= 1")
        if cache is not None and cache.block != chunk:
            raise ValueError(f"chunk is {chunk} and the cache's block {cache.block}; expected the same")
        self.model, self.tokenizer, self.chunk, self.cache = model, tokenizer, chunk, cache
        self._slots: list[_Running | None] = [None] * slots
        self._step = DecodeStep(model, slots, graph, memory_dtype)
        self._fresh = model.initial_state(1)
        self._last = [0] * slots  # the token that each slot reads next
        self._waiting: deque[_Running] = deque()
        self._reading: _Running | None = None
        self._ended: list[Event] = []  # cancelled since the last step
        self._count = 0

    @property
    def slots(self) -> int:
        """Texts that run at a time."""
        return len(self._slots)

    @property
    def running(self) -> int:
        """Requests in a slot, or whose prompt is being read."""
        return sum(slot is not None for slot in self._slots) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        """Requests whose prompt is not yet being read."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether a step would bring nothing."""
        return not (self.running or self._waiting or self._ended)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of all slots."""
        return self._step.state_bytes

    def submit(self, request: Request) -> int:
        """Take in a request; returns its number, under which events tell of it. ValueError for one that cannot be."""
        vocab = self.model.config.vocab_size
        for name, tokens in (("prompt", request.prompt), ("stop_tokens", request.stop_tokens)):
            for token in tokens:
                _require(0 <= token < vocab, f"{name}: token", token, f"an id in [0, {vocab})")
        _require(len(request.prompt) >= 1, "prompt", list(request.prompt), "at least one token")
        _require(request.max_new_tokens >= 1, "max_new_tokens", request.max_new_tokens, "an integer >= 1")
        _require(0 <= request.temperature < float("inf"), "temperature", request.temperature, "a number >= 0")
        _require(request.top_k >= 0, "top_k", request.top_k, "an integer >= 0")
        _require(0 < request.top_p <= 1, "top_p", request.top_p, "a number in (0, 1]")
        seed = request.seed
        _require(seed is None or 0 <= seed < 2**63, "seed", seed, "an integer in [0, 2**63), or None")
        for name, top in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
            _require(top is None or 0 <= top <= vocab, name, top, f"0 to {vocab}, or None")
        generator = torch.Generator()
        generator.manual_seed(generator.seed() % 2**63 if seed is None else seed)
        self._waiting.append(
            _Running(
                self._count,
                request,
                generator,
                frozenset((*request.stop_tokens, self.tokenizer.end_of_text)),
                self.tokenizer.stream(),
                StopStrings(request.stop_strings),
            )
        )
        self._count += 1
        return self._count - 1

    @torch.inference_mode()
    def cancel(self, number: int) -> bool:
        """End a request; the next step tells so. False when there is none of this number, or it has ended."""
        for running in (*self._slots, self._reading, *self._waiting):
            if running is not None and running.id == number:
                break
        else:
            return False
        if running in self._slots:
            self._release(self._slots.index(running))
        elif running is self._reading:
            self._reading = None
        else:
            self._waiting.remove(running)
        self._ended.append(Event(number, None, "", None, "cancelled"))
        return True

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read a chunk of a prompt and take one step of every text that runs; returns what that brought."""
        events, self._ended = self._ended, []
        if any(self._slots):
            rows = [i for i, slot in enumerate(self._slots) if slot is not None]
            texts = [text for text in self._slots if text is not None]
            self._make_room()
            logits = self._step(self._last)
            events += self._say(texts, logits, self._step.likeliest, rows, rows)
        events += self._prefill()
        return events

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Run requests to their end, with whatever else is there; returns theirs in order."""
        numbers = [self.submit(request) for request in requests]
        events: dict[int, list[Event]] = {number: [] for number in numbers}
        while any(not told or told[-1].finish is None for told in events.values()):
            for event in self.step():
                events.get(event.request, []).append(event)
        return [
            Completion(
                "".join(event.text for event in told),
                [event.token for event in told if event.token is not None],
                [event.score for event in told if event.token is not None and event.score is not None],
                told[-1].finish or "",
            )
            for told in events.values()
        ]

    def _prefill(self) -> list[Event]:
        """Read the next chunk of a prompt, and give it a slot once it is read."""
        if self._reading is None and self._waiting and None in self._slots:
            self._reading = self._waiting.popleft()
            self._reading.session = Session(self.model, self.chunk, keep=0, memory_dtype=self._step.memory_dtype)
            cache = self.cache if self._reading.request.prompt_logprobs is None else None
            found = None if cache is None else cache.find(self._reading.request.prompt[:-1])
            if found is not None:
                self._reading.session.restore(Snapshot(*found))
        running = self._reading
        if running is None or running.session is None:
            return []
        session, prompt = running.session, running.request.prompt
        piece = prompt[len(session) : len(session) + self.chunk - len(session) % self.chunk]
        top = running.request.prompt_logprobs
        logits = session.read(piece, last=1 if top is None else len(piece))
        if top is not None:
            following = prompt[len(session) - len(piece) + 1 : len(session) + 1]
            running.prompt_scores += _scores(logits[: len(following)], following, top)
            logits = logits[-1:]
        snapshot = session.snapshot()
        if self.cache is not None:
            self.cache.store(snapshot.tokens, snapshot.state)
        if len(session) < len(prompt):
            return []
        slot = self._slots.index(None)
        self._reading, running.session = None, None
        self._slots[slot] = running
        self._make_room()
        self._step.put(slot, snapshot.state)
        (event,) = self._say([running], logits, likeliest_tokens(logits), [0], [slot])
        return [event]

    def _say(
        self, texts: Sequence[_Running], logits: Tensor, likeliest: Tensor, rows: Sequence[int], slots: Sequence[int]
    ) -> list[Event]:
        """Choose the next token of each text from its row of logits, and end those that are done."""
        best = likeliest.tolist()
        _require(
            min(best[row] for row in rows) >= 0, "a logit", float("nan"), "numbers; the model's weights are broken"
        )
        chosen = {row: best[row] for row in rows}
        alike: dict[tuple[float, int, float], list[int]] = {}
        for i, text in enumerate(texts):
            if text.request.temperature > 0:
                alike.setdefault((text.request.temperature, text.request.top_k, text.request.top_p), []).append(i)
        for settings, part in alike.items():
            # Drawn on the CPU, so that a seed gives one text on every device.
            uniform = torch.stack([torch.rand((), generator=texts[i].generator, dtype=torch.float64) for i in part])
            of = [rows[i] for i in part]
            chosen |= zip(of, sample_tokens(logits[of], *settings, uniform.to(logits.device)).tolist())
        return [self._tell(text, logits[row], chosen[row], slot) for text, row, slot in zip(texts, rows, slots)]

    def _tell(self, text: _Running, logits: Tensor, token: int, slot: int) -> Event:
        score = None if text.request.logprobs is None else _scores(logits[None], [token], text.request.logprobs)[0]
        if token in text.ends:
            return self._end(text, slot, None, "", score, "stop")
        text.new.append(token)
        self._last[slot] = token
        piece = text.stop.feed(text.stream.feed(token))
        if text.stop.stopped:
            return self._end(text, slot, token, piece, score, "stop")
        if len(text.new) == text.request.max_new_tokens:
            return self._end(text, slot, token, piece, score, "length")
        return Event(text.id, token, piece, score, None, _take(text.prompt_scores))

    def _end(
        self, text: _Running, slot: int, token: int | None, piece: str, score: TokenScore | None, finish: str
    ) -> Event:
        if self.cache is not None:
            read = [*text.request.prompt, *text.new]
            if token is not None:
                read.pop()  # chosen, never read
            self.cache.store(read, self._step.take(slot, len(read)))
        self._release(slot)
        rest = text.stop.feed(text.stream.flush()) + text.stop.flush()
        return Event(text.id, token, piece + rest, score, finish, _take(text.prompt_scores))

    def _release(self, slot: int) -> None:
        self._slots[slot] = None
        self._last[slot] = 0
        self._step.put(slot, self._fresh)

    def _make_room(self) -> None:
        """For the longest text, with what it reads next."""
        texts = [text for text in self._slots if text is not None]
        self._step.make_room(max(len(text.request.prompt) + len(text.new) for text in texts))


def _scores(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Of each token [n] under its row of logits [n, vocab]."""
    scores = logits.log_softmax(-1)
    best = scores.topk(top)
    own = scores.gather(1, torch.tensor(list(tokens), device=logits.device, dtype=torch.int64)[:, None])[:, 0]
    rows = zip(own.tolist(), best.indices.tolist(), best.values.tolist())
    return [TokenScore(score, dict(zip(ids, values))) for score, ids, values in rows]


def _take(scores: list[TokenScore]) -> tuple[TokenScore, ...]:
    """All of them, once."""
    taken = tuple(scores)
    scores.clear()
    return taken


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; expected {expected}")
