"""Recall from the context: RULER's needle tasks and a key-value task small enough for a tiny byte-level model.

Needles: a sentence names a value for a key somewhere in a long text, and the model is asked for it. The haystack is
one repeated line (`niah_single_1`) or natural text, RULER's "essays": here the text that the caller hands over, by
habit the validation documents of the corpus, with runs of white space made one space.

Key-value recall: lines of `key=value`, a blank line, then `key=`. A key is one letter and a value one digit, all
different, so that guessing any value seen scores 1 / pairs. The training documents hold few pairs, half of them only
one, and ask for each eight times: a tiny byte-level model learns to repeat the one pair within minutes, and with it to
recall many. Without such a first step, or with longer keys, the signal is too thin to start on.
"""

import random
import re
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, digits

import numpy as np

from gdn2.data import TokenFile, Tokenizer
from gdn2.generate import generate_text
from gdn2.model import LanguageModel

RECALL_PAIRS = 8  # in a question
TAUGHT_PAIRS = (1, 1, 1, 2, 3, 4)  # in a training document, equally likely
ASKED = 8  # times that a training document asks for each pair
ANSWER_TOKENS = 128  # what RULER lets a model write, and keeps free of the length
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # percent of the haystack's sentences before a needle
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class NeedleTask:
    """`kind` of value ('number' or 'uuid'), whether the haystack is the caller's text, and needles hidden."""

    kind: str
    essays: bool
    needles: int = 1


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask("number", essays=False),
    "niah_single_2": NeedleTask("number", essays=True),
    "niah_single_3": NeedleTask("uuid", essays=True),
    "niah_multikey_1": NeedleTask("number", essays=True, needles=4),
}


@dataclass(frozen=True)
class NeedleSample:
    """A prompt, the strings that its continuation should contain, and the depth of the needle asked for, percent."""

    prompt: str
    answers: tuple[str, ...]
    depth: int


AnswerFn = Callable[[Sequence[str]], Sequence[str]]


def niah_samples(
    kind: str, tokenizer: Tokenizer, length: int, n: int, seed: int, corpus: str | None = None
) -> list[NeedleSample]:
    """`n` prompts of a RULER needle task, each as long as fits `length` tokens with its answer and 128 new ones.

    `corpus` is the text of the haystack for the tasks with essays: each sample starts at a drawn word and wraps round.
    ValueError for an unknown kind, for essays without text, and for a length that the bare question does not fit.
    """
    if kind not in NEEDLE_TASKS:
        raise ValueError(f"needle task {kind!r}; expected one of {', '.join(NEEDLE_TASKS)}")
    task = NEEDLE_TASKS[kind]
    words = _words(corpus or "") if task.essays else []
    if task.essays and not words:
        raise ValueError(f"{kind} hides its needles in essays, and corpus is {corpus!r}; expected natural text")
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1 sample")
    rng = random.Random(f"{kind} {seed}")
    return [_niah_sample(task, tokenizer, length, rng, words) for _ in range(n)]


def _niah_sample(
    task: NeedleTask, tokenizer: Tokenizer, length: int, rng: random.Random, words: Sequence[str]
) -> NeedleSample:
    keys = _keys(rng, task.needles)
    values = [_value(rng, task.kind) for _ in keys]
    depths = sorted(rng.sample(DEPTHS, len(keys)))
    asked = rng.randrange(len(keys))
    start = rng.randrange(len(words)) if words else 0
    needles = [f"One of the special magic {task.kind}s for {key} is: {value}." for key, value in zip(keys, values)]

    def prompt(size: int) -> str:
        if task.essays:
            text = " ".join(words[(start + i) % len(words)] for i in range(size)).removesuffix("\n")
            context = " ".join(_hide(text.split("\n ") if size else [], needles, depths))
        else:
            context = "\n".join(_hide([GRASS] * size, needles, depths))
        return (
            f"A special magic {task.kind} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {task.kind} afterwards.\n{context}\n"
            f"What is the special magic {task.kind} for {keys[asked]} mentioned in the provided text? "
            f"The special magic {task.kind} for {keys[asked]} mentioned in the provided text is"
        )

    def tokens(size: int) -> int:
        return len(tokenizer.encode(prompt(size))) + len(tokenizer.encode(values[asked])) + ANSWER_TOKENS

    if tokens(0) > length:
        raise ValueError(f"length is {length} tokens; expected at least {tokens(0)}, the question without a haystack")
    # A word or line is at least one token: `length` of them never fit. The last size that does is wanted.
    size = bisect_right(range(1, length), length, key=tokens)
    return NeedleSample(prompt(size), (values[asked],), depths[asked])


def _words(text: str) -> list[str]:
    """The words of `text`, those that end a sentence or a paragraph with a line break behind them."""
    sentences = (sentence.split() for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    return [word for sentence in sentences if sentence for word in (*sentence[:-1], sentence[-1] + "\n")]


def essays(token_file: TokenFile, tokenizer: Tokenizer, tokens: int = 1_000_000) -> str:
    """The text of the file's first documents, a blank line between them, up to about `tokens` tokens of it."""
    last = max(1, int(np.searchsorted(token_file.offsets, tokens, side="right")) - 1)
    documents = np.split(token_file.tokens[: token_file.offsets[last]], token_file.offsets[1:last])
    return "\n\n".join(tokenizer.decode(document.tolist()) for document in documents)


def _hide(sentences: list[str], needles: Sequence[str], depths: Sequence[int]) -> list[str]:
    """`sentences` with each needle before sentence int(n * depth / 100); depths ascend."""
    out, n = list(sentences), len(sentences)
    for needle, depth in reversed(list(zip(needles, depths))):
        out.insert(int(n * depth / 100), needle)
    return out


def _keys(rng: random.Random, n: int) -> list[str]:
    """`n` different adjective-noun keys."""
    chosen = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), n)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in chosen]


def _value(rng: random.Random, kind: str) -> str:
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return str(rng.randint(10**6, 10**7 - 1))


def needle_documents(n: int, length: int, tokenizer: Tokenizer, seed: int) -> Iterator[str]:
    """`n` training documents of at most `length` tokens or so: `niah_single_1` prompts followed by their answer."""
    for sample in niah_samples("niah_single_1", tokenizer, length + ANSWER_TOKENS, n, seed):
        yield f"{sample.prompt} {sample.answers[0]}."


def score(samples: Sequence[NeedleSample], answer: AnswerFn) -> float:
    """Percent of the answers found, whatever their case, in what `answer` says to the prompts."""
    replies = answer([sample.prompt for sample in samples])
    if len(replies) != len(samples):
        raise ValueError(f"{len(replies)} replies to {len(samples)} prompts; expected one each")
    found = [
        sum(gold.lower() in reply.lower() for gold in sample.answers) / len(sample.answers)
        for sample, reply in zip(samples, replies)
    ]
    return 100 * sum(found) / len(found)


@dataclass(frozen=True)
class RecallSample:
    """Lines of `key=value` and a query `key=`, and the value that should follow."""

    prompt: str
    answer: str


def recall_samples(n: int, seed: int, pairs: int = RECALL_PAIRS) -> list[RecallSample]:
    """`n` key-value queries over `pairs` (1 to 10) lines. Guessing any value seen scores 1 / pairs."""
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1 sample")
    rng = random.Random(f"recall samples {seed}")
    samples = []
    for _ in range(n):
        shown = _pairs(rng, pairs)
        key, value = rng.choice(shown)
        samples.append(RecallSample(_lines(shown) + f"\n{key}=", value))
    return samples


def recall_documents(n: int, seed: int) -> Iterator[str]:
    """`n` training documents of the key-value task: a few pairs, then each ASKED times in any order."""
    rng = random.Random(f"recall documents {seed}")  # another stream than the samples', whatever the seeds
    for _ in range(n):
        shown = _pairs(rng, rng.choice(TAUGHT_PAIRS))
        yield _lines(shown) + "\n" + "".join(_lines(rng.sample(shown, len(shown))) for _ in range(ASKED))


def _pairs(rng: random.Random, n: int) -> list[tuple[str, str]]:
    if not 1 <= n <= len(digits):
        raise ValueError(f"pairs is {n}; expected 1 to {len(digits)}, for values that differ")
    return list(zip(rng.sample(ascii_lowercase, n), rng.sample(digits, n)))


def _lines(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"{key}={value}\n" for key, value in pairs)


def exact(samples: Sequence[RecallSample], answer: AnswerFn) -> float:
    """Percent of the samples whose reply, up to the end of its line, is the value."""
    replies = answer([sample.prompt for sample in samples])
    if len(replies) != len(samples):
        raise ValueError(f"{len(replies)} replies to {len(samples)} prompts; expected one each")
    right = [reply.partition("\n")[0] == sample.answer for sample, reply in zip(samples, replies)]
    return 100 * sum(right) / len(right)


def greedy(
    model: LanguageModel,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    batch: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AnswerFn:
    """The model's own answers: greedy continuations, `batch` prompts at a time.

    `progress` is told how many prompts are done, and of how many.
    """

    def answer(prompts: Sequence[str]) -> list[str]:
        replies: list[str] = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            steps = generate_text(model, tokenizer, part, max_new_tokens, temperature=0, stop_strings=stop_strings)
            replies += map("".join, zip(*steps))
            progress(len(replies), len(prompts))
        return replies

    return answer


ADJECTIVES = (
    "amber", "ancient", "bitter", "bold", "brave", "brisk", "calm", "clever", "cosmic", "crimson", "curious", "daring",
    "dusty", "eager", "faint", "fearless", "gentle", "gilded", "hollow", "humble", "icy", "jolly", "keen", "lively",
    "lone", "mellow", "misty", "noble", "odd", "patient", "quiet", "rapid", "rustic", "silent", "sturdy", "tender",
    "vivid", "wandering", "witty", "young",
)  # fmt: skip
NOUNS = (
    "anchor", "badger", "beacon", "bridge", "candle", "canyon", "cedar", "comet", "compass", "crane", "desert", "drum",
    "ember", "falcon", "fern", "forest", "garden", "glacier", "harbor", "hill", "island", "kettle", "lantern", "meadow",
    "library", "mirror", "needle", "orchard", "otter", "pebble", "piano", "pine", "quarry", "river", "saddle", "shadow",
    "thistle", "tower", "valley", "willow",
)  # fmt: skip
