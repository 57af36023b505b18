"""RULER's needle tasks, made offline: sentences name values for keys within a long text, and the model is asked.

    niah_single_1    one line repeated      a word -> a number
    niah_single_2    essays                 a word -> a number
    niah_single_3    essays                 a word -> a UUID
    niah_multikey_1  essays                 four keys, one asked for
    niah_multikey_2  other needles          a word -> a number
    niah_multikey_3  other needles          a UUID -> a UUID
    niah_multivalue  essays                 four values of one key, all asked for
    niah_multiquery  essays                 four keys, all asked for

Templates, haystacks, places, lengths and the score are RULER's. Its essays are any natural text here, the caller's:
by habit the validation documents of the corpus, with runs of white space made one space, each sample from a drawn word
on. Keys are drawn without repetition from our own list of words.
"""

import json
import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np

from gdn2.data import TokenFile, Tokenizer
from gdn2.evaluation.answers import AnswerFn, reply_to_each
from gdn2.evaluation.words import ADJECTIVES, NOUNS

ANSWER_TOKENS = 128  # what RULER lets a model write, and keeps free of the length
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # percent of the essays' sentences before a needle
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
MIXED_IN = re.compile(r"One of the special magic \w+ for |\A(?:(?:[a-z]=\d)?\n)+\Z")
Kind = Literal["word", "number", "uuid"]


@dataclass(frozen=True)
class NeedleTask:
    """`keys` keys have `values` values each, and `queries` of the keys are asked for, with all their values."""

    haystack: Literal["line", "essays", "needles"]
    value: Kind = "number"
    key: Kind = "word"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("line"),
    "niah_single_2": NeedleTask("essays"),
    "niah_single_3": NeedleTask("essays", "uuid"),
    "niah_multikey_1": NeedleTask("essays", keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", "uuid", "uuid"),
    "niah_multivalue": NeedleTask("essays", values=4),
    "niah_multiquery": NeedleTask("essays", keys=4, queries=4),
}


@dataclass(frozen=True)
class NeedleSample:
    """A prompt, the strings that its continuation should contain, and the depth of the needle asked for: percent of
    the haystack's sentences before it, None where several needles are asked for."""

    prompt: str
    answers: tuple[str, ...]
    depth: float | None


@dataclass(frozen=True)
class Haystack:
    """Natural text for the tasks with essays, and how results name it."""

    text: str
    name: str

    @property
    def sha256(self) -> str:
        return sha256(self.text.encode("utf-8")).hexdigest()


def needle_task(name: str) -> NeedleTask:
    """ValueError for a name that is none of NEEDLE_TASKS."""
    if name not in NEEDLE_TASKS:
        raise ValueError(f"needle task {name!r}; expected one of {', '.join(NEEDLE_TASKS)}")
    return NEEDLE_TASKS[name]


def niah_samples(
    name: str,
    tokenizer: Tokenizer,
    length: int,
    n: int,
    seed: int | str,
    corpus: str | None = None,
    depth: float | None = None,
) -> list[NeedleSample]:
    """`n` prompts of a needle task, each as long as fits `length` tokens with its answers and 128 new ones.

    Args:
        name: one of NEEDLE_TASKS.
        corpus: the haystack's text for the tasks with essays; it wraps round where it is short.
        depth: percent of the haystack before the needle asked for; by itself it is drawn, as RULER draws it.

    Raises:
        ValueError: an unknown task, essays without text, a length that the bare question does not fit, a depth outside
            [0, 100] or for a task that asks for several needles.
    """
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1 sample")
    return list(islice(_samples(name, tokenizer, length, seed, corpus, depth), n))


def _samples(
    name: str, tokenizer: Tokenizer, length: int, seed: int | str, corpus: str | None, depth: float | None
) -> Iterator[NeedleSample]:
    """`niah_samples` without end."""
    task = needle_task(name)
    words = _words(corpus or "") if task.haystack == "essays" else []
    if task.haystack == "essays" and not words:
        raise ValueError(f"{name} hides its needles in essays, and corpus is {corpus!r}; expected natural text")
    if depth is not None and not 0 <= depth <= 100:
        raise ValueError(f"depth is {depth}; expected percent, 0 to 100")
    if depth is not None and task.queries * task.values > 1:
        raise ValueError(f"{name} asks for several needles; expected no depth")
    rng = random.Random(f"{name} {seed}")
    size = length // 16
    while True:
        sample = _Sample(task, rng, words, depth)

        def tokens(size: int, sample: _Sample = sample) -> int:
            answers = tokenizer.encode(" ".join(sample.answers))
            return len(tokenizer.encode(sample.prompt(size)[0])) + len(answers) + ANSWER_TOKENS

        size = largest_fit(tokens, length, size, sample.most_units(length))
        prompt, found = sample.prompt(size)
        yield NeedleSample(prompt, sample.answers, found)


def largest_fit(tokens: Callable[[int], int], limit: int, guess: int, most: int) -> int:
    """The size, 0 to `most` units, at which tokens(size) <= limit and one unit more is too much.

    A unit is a token at least. Few sizes are tried: each costs the tokenizer a whole prompt.
    ValueError when not even 0 units fit.
    """
    low, at_low = 0, tokens(0)
    if at_low > limit:
        raise ValueError(f"length is {limit} tokens; expected at least {at_low}, the question without a haystack")
    high = min(most, limit) + 1  # too much, or not to be had
    per_unit = max(1.0, (limit - at_low) / max(guess, 1))
    tries = 0
    while high - low > 1:
        tries += 1
        estimate = low + int((limit - at_low) / per_unit)
        size = (low + high) // 2 if tries % 8 == 0 else min(max(estimate, low + 1), high - 1)
        found = tokens(size)
        per_unit = max(1.0, (found - at_low) / (size - low))
        if found <= limit:
            low, at_low = size, found
        else:
            high = size
    return low


class _Sample:
    """One question; what is drawn for it does not depend on the size of its haystack."""

    def __init__(self, task: NeedleTask, rng: random.Random, words: Sequence[str], depth: float | None) -> None:
        self.task, self.depth, self.words = task, depth, words
        self.start = rng.randrange(len(words)) if words else 0
        self.fresh_keys = _different(random.Random(rng.getrandbits(64)), task.key)
        keys = [next(self.fresh_keys) for _ in range(task.keys)]
        values = {key: [_draw(rng, task.value) for _ in range(task.values)] for key in keys}
        self.queries = rng.sample(keys, task.queries)
        self.answers = tuple(value for key in self.queries for value in values[key])
        needles = [_needle(task, key, value) for key in keys for value in values[key]]
        self.needles = rng.sample(needles, len(needles))
        self.asked = self.needles.index(_needle(task, self.queries[0], self.answers[0]))
        self.lines: list[str] = []  # of a haystack of needles, as many as were wanted so far
        self.line_rng, self.place_seed = random.Random(rng.getrandbits(64)), rng.getrandbits(64)

    def most_units(self, length: int) -> int:
        """Units of haystack there are: lines that need a key of their own are as many as the keys left."""
        if self.task.haystack == "needles" and self.task.key == "word":
            return min(length, len(ADJECTIVES) * len(NOUNS) - self.task.keys)
        return length

    def prompt(self, size: int) -> tuple[str, float | None]:
        """The prompt with `size` lines or words of haystack, and the depth of the needle asked for."""
        if self.task.haystack == "essays":
            words = (self.words[(self.start + i) % len(self.words)] for i in range(size))
            sentences = " ".join(words).removesuffix("\n").split("\n ") if size else []
        else:
            sentences = self._lines(size)
        places, depth = self._places(len(sentences))
        for place, needle in sorted(zip(places, self.needles), key=lambda pair: pair[0], reverse=True):
            sentences.insert(place, needle)
        context = (" " if self.task.haystack == "essays" else "\n").join(sentences)
        return _question(self.task, context, self.queries), depth if len(self.answers) == 1 else None

    def _lines(self, size: int) -> list[str]:
        if self.task.haystack == "line":
            return [GRASS] * size
        while len(self.lines) < size:
            self.lines.append(_needle(self.task, next(self.fresh_keys), _draw(self.line_rng, self.task.value)))
        return self.lines[:size]

    def _places(self, n: int) -> tuple[list[int], float]:
        """For each needle the number of the `n` sentences before it; and the depth of the first one asked for."""
        rng, count = random.Random(self.place_seed), len(self.needles)
        if self.task.haystack == "essays":
            depths: list[float] = list(rng.sample(DEPTHS, count))
            places = [int(n * depth / 100) for depth in depths]
        else:
            places = rng.sample(range(max(n, count)), count)
            depths = [100 * place / max(n, 1) for place in places]
        if self.depth is not None:
            depths[self.asked], places[self.asked] = self.depth, int(n * self.depth / 100)
        return places, depths[self.asked]


def _needle(task: NeedleTask, key: str, value: str) -> str:
    return f"One of the special magic {task.value}s for {key} is: {value}."


def _question(task: NeedleTask, context: str, queries: Sequence[str]) -> str:
    """RULER's prompt: the task, the context, the question and the beginning of the answer."""
    asked = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    if task.queries * task.values == 1:
        some, one, verb, question = "A", str(task.value), "is", "What is the"
    else:
        some, one, verb, question = "Some", f"{task.value}s", "are", "What are all the"
    subject = f"special magic {one} for {asked} mentioned in the provided text"
    return (
        f"{some} special magic {one} {verb} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {one} afterwards.\n{context}\n{question} {subject}? The {subject} {verb}"
    )


def _words(text: str) -> list[str]:
    """The words of `text`, those that end a sentence or a paragraph with a line break behind them."""
    sentences = (sentence.split() for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    return [word for sentence in sentences if sentence for word in (*sentence[:-1], sentence[-1] + "\n")]


def _different(rng: random.Random, kind: Kind) -> Iterator[str]:
    """Keys of a kind, none twice; there must be some left."""
    seen = set()
    while True:
        key = _draw(rng, kind)
        if key not in seen:
            seen.add(key)
            yield key


def _draw(rng: random.Random, kind: Kind) -> str:
    if kind == "word":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return str(rng.randint(10**6, 10**7 - 1))


def read_haystack(path: Path) -> Haystack:
    """A text file, or a JSON object with the text in its field "text", as RULER keeps its essays.

    ValueError for a file that is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = json.loads(text)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"haystack {str(path)!r} is neither UTF-8 text nor JSON with a field 'text'") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"haystack {str(path)!r} holds no text")
    return Haystack(text, path.name)


def essays(token_file: TokenFile, tokenizer: Tokenizer, tokens: int = 1_000_000) -> str:
    """The text of the file's first documents, a blank line between them, up to about `tokens` tokens of it.

    Needle and recall documents that `prepare` mixed in are left out: their needles would be there to find as well.
    """
    last = max(1, int(np.searchsorted(token_file.offsets, tokens, side="right")) - 1)
    documents = np.split(token_file.tokens[: token_file.offsets[last]], token_file.offsets[1:last])
    texts = (tokenizer.decode(document.tolist()) for document in documents)
    return "\n\n".join(text for text in texts if not MIXED_IN.search(text))


def needle_documents(
    n: int,
    length: int,
    tokenizer: Tokenizer,
    seed: int | str,
    names: Sequence[str] = ("niah_single_1",),
    corpus: str | None = None,
) -> Iterator[str]:
    """`n` training documents of at most `length` tokens or so: prompts of the tasks in turn, each with its answers.

    They are the questions of `niah_samples` with the same seed, at any length, answers included: take another than is
    asked with. `gdn2 eval` asks with none that is an integer, or that `gdn2 prepare` takes.
    """
    streams = [_samples(name, tokenizer, length + ANSWER_TOKENS, seed, corpus, None) for name in names]
    for sample in islice(chain.from_iterable(zip(*streams)), n):
        yield f"{sample.prompt} {', '.join(sample.answers)}."


def scores(samples: Sequence[NeedleSample], answer: AnswerFn) -> list[float]:
    """For each sample the percentage of its answers found, whatever their case, in what `answer` says."""
    replies = reply_to_each([sample.prompt for sample in samples], answer)
    return [
        100 * sum(gold.lower() in reply.lower() for gold in sample.answers) / len(sample.answers)
        for sample, reply in zip(samples, replies)
    ]


def score(samples: Sequence[NeedleSample], answer: AnswerFn) -> float:
    """The mean of `scores`, percent."""
    return sum(scores(samples, answer)) / len(samples)


def niah_grid(
    name: str,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float] | None,
    n: int,
    seed: int | str,
    answer: AnswerFn,
    corpus: str | None = None,
) -> list[list[float]]:
    """Percent found for each of `lengths`, tokens, a row, and each of `depths`, percent; `n` samples a cell.

    Without depths each row is one number, over depths as RULER draws them. ValueErrors are those of `niah_samples`,
    before the first question is asked.
    """
    places: Sequence[float | None] = depths or [None]
    cells = [[niah_samples(name, tokenizer, length, n, seed, corpus, depth) for depth in places] for length in lengths]
    return [[score(cell, answer) for cell in row] for row in cells]
