"""Key-value recall: a task small enough for a tiny byte-level model.

Lines of `key=value`, a blank line, then `key=`. A key is one letter and a value one digit, all
different, so that guessing any value seen scores 1 / pairs. The training documents hold few pairs, half of them only
one, and ask for each eight times: a tiny byte-level model learns to repeat the one pair within minutes, and with it to
recall many. Without such a first step, or with longer keys, the signal is too thin to start on.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, digits

from gdn2.evaluation.answers import AnswerFn, reply_to_each

RECALL_PAIRS = 8  # in a question
TAUGHT_PAIRS = (1, 1, 1, 2, 3, 4)  # in a training document, equally likely
ASKED = 8  # times that a training document asks for each pair


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
    replies = reply_to_each([sample.prompt for sample in samples], answer)
    right = [reply.partition("\n")[0] == sample.answer for sample, reply in zip(samples, replies)]
    return 100 * sum(right) / len(right)
