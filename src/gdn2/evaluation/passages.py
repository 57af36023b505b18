"""Recall from real documents, answer-centred: SWDE, SQuAD, FDA, TriviaQA, NQ and DROP, cut to one length.

A document is cut to a window around the first place where the answer stands, so that a model of any length is asked a
question whose answer it has seen. It writes 48 tokens or up to a line break; any of the answers in them, whatever the
case, is right. The data is the user's: a folder with `swde.jsonl`, `squad.jsonl` and so on, whose lines are

    {"context": "...", "question": "...", "answers": ["..."]}      a question, or a cue that the answer completes
    {"text": "...\\ncue", "value": "..."}                           the same, the cue being the text's last line
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from gdn2.data import Tokenizer
from gdn2.evaluation.answers import AnswerFn, reply_to_each

PASSAGE_TASKS = ("swde", "squad", "fda", "triviaqa", "nq", "drop")
NEW_TOKENS = 48
KEPT_FREE = 50  # tokens of the length, for what is written


@dataclass(frozen=True)
class Passage:
    """A document, the question or cue behind it, and the answers of which any will do."""

    context: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class PassageSample:
    prompt: str
    answers: tuple[str, ...]


def read_passages(folder: Path, task: str) -> list[Passage]:
    """The passages of FOLDER/TASK.jsonl. ValueError for a file that is not there, or a line of another form."""
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        raise ValueError(f"{task} needs the file {str(path)!r}; expected JSON lines with context, question and answers")
    return list(_lines(path))


def _lines(path: Path) -> Iterator[Passage]:
    # Lines end with line feeds alone: other breaks, such as U+2028, may stand in JSON as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            yield _passage(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: no passage ({error!r}); expected an object with context, question and a list "
                "of answers, or text and value, that are not empty"
            ) from error


def _passage(record: dict[str, Any]) -> Passage:
    if "text" in record:
        context, _, question = record["text"].rpartition("\n")
        answers = [record["value"]]
    else:
        context, question, answers = record["context"], record["question"], record["answers"]
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"answers is {answers!r}")
    if not all(isinstance(part, str) and part.strip() for part in (context, question, *answers)):
        raise ValueError("a part is empty or no text")
    return Passage(context, question.strip(), tuple(answer.strip() for answer in answers))


def passage_samples(passages: Sequence[Passage], tokenizer: Tokenizer, length: int) -> list[PassageSample]:
    """A prompt of at most `length` - 50 tokens, or very few more, for each passage whose answer stands in its context.

    The window of the context has the first place of an answer in its middle, as far as the context goes; a line break
    and the question follow. ValueError for a length that leaves no room for a question and its answer.
    """
    samples = []
    for passage in passages:
        places = [(find(passage.context, answer), answer) for answer in passage.answers]
        found = [(at, answer) for at, answer in places if at is not None]
        if not found:
            continue
        at, answer = min(found)
        ids = tokenizer.encode(passage.context)
        before, inside = (len(tokenizer.encode(text)) for text in (passage.context[:at], answer))
        room = length - KEPT_FREE - len(tokenizer.encode("\n" + passage.question))
        if room < inside + 2:
            raise ValueError(
                f"length is {length} tokens; expected at least {length - room + inside + 2}, for {passage}"
            )
        start = max(0, min(before + inside // 2 - room // 2, len(ids) - room))
        window = passage.context if len(ids) <= room else tokenizer.decode(ids[start : start + room])
        samples.append(PassageSample(f"{window}\n{passage.question}", passage.answers))
    return samples


def find(text: str, answer: str) -> int | None:
    """Where in the text the answer first stands, whatever its case; None where it does not."""
    at = text.lower().find(answer.lower())
    if at < 0:
        return None
    ends = list(accumulate(len(letter.lower()) for letter in text))  # in lower case some, as "İ", are two
    return bisect_right(ends, at)


def score(samples: Sequence[PassageSample], answer: AnswerFn) -> float:
    """Percent of the samples whose reply contains an answer, whatever its case."""
    replies = reply_to_each([sample.prompt for sample in samples], answer)
    right = [any(gold.lower() in reply.lower() for gold in s.answers) for s, reply in zip(samples, replies)]
    return 100 * sum(right) / len(right)
