"""The evaluation tasks by name, their results as plain values, and those as a table."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gdn2.data import TokenFile, Tokenizer
from gdn2.data.shards import sha256_of
from gdn2.evaluation import language, needles, passages, retrieval
from gdn2.evaluation.answers import greedy
from gdn2.evaluation.results import HARNESS, Result
from gdn2.model import LanguageModel

if TYPE_CHECKING:
    from rich.table import Table

TASKS = ("perplexity", "recall", *needles.NEEDLE_TASKS, *passages.PASSAGE_TASKS)
RECALL_TOKENS = 4  # enough for one digit and the end of its line, under any tokenizer
NEEDLE_LENGTH = 1_024
NEEDLE_SEED = "gdn2 eval {}"  # a text: training documents may have been drawn with any integer
PASSAGE_LENGTH = 2_048


def check_tasks(names: list[str]) -> list[str]:
    """`names` as they are. ValueError for one that is neither one of TASKS nor called lm_eval:SOMETHING."""
    for name in names:
        if name not in TASKS and not name.startswith(HARNESS):
            raise ValueError(f"task is {name!r}; expected one of {', '.join(TASKS)}, or {HARNESS}NAME")
    return names


def evaluate(
    task: str,
    model: LanguageModel,
    tokenizer: Tokenizer,
    token_file: TokenFile,
    *,
    seq_len: int,
    packed: bool,
    lengths: Sequence[int],
    depths: Sequence[float],
    haystack: needles.Haystack | None,
    passage_data: Path | None,
    tokens: int,
    samples: int,
    seed: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Run one of TASKS on held-out text; returns its result with the settings that produced it.

    `perplexity` scores about `tokens` targets in windows of the longest of `lengths`, or of `seq_len` where there is
    none, and heeds the borders of documents when `packed`, as training did. The others ask `samples` questions drawn
    with `seed`: needles in prompts of each of `lengths` tokens, or of NEEDLE_LENGTH, at each of `depths`, percent, or
    at drawn ones; they hide in `haystack`, or in the validation documents. `progress` is told how many targets or
    samples are done, and of how many. ValueError for what the task refuses.
    """
    check_tasks([task])
    if task == "perplexity":
        length = max(lengths, default=seq_len)
        score = language.perplexity(model, token_file, length, tokens, device, packed, progress)
        text = {"length": length, "packed": packed, "data_sha256": token_file.sha256}
        return {"task": task} | asdict(score) | text
    if task == "recall":
        questions = retrieval.recall_samples(samples, seed)
        answer = greedy(model, tokenizer, RECALL_TOKENS, ["\n"], progress=progress)
        chance = {"chance_percent": 100 / retrieval.RECALL_PAIRS, "pairs": retrieval.RECALL_PAIRS}
        scores: Result = {"task": task, "percent": retrieval.exact(questions, answer), **chance}
        return scores | {"samples": samples, "seed": seed}
    if task in passages.PASSAGE_TASKS:
        return _passages(task, model, tokenizer, passage_data, max(lengths, default=PASSAGE_LENGTH), progress)
    lengths = lengths or [NEEDLE_LENGTH]
    about, corpus = _haystack(task, haystack, token_file, tokenizer)
    total = samples * len(lengths) * max(1, len(depths))
    answer = greedy(model, tokenizer, needles.ANSWER_TOKENS, progress=progress, total=total)
    grid = needles.niah_grid(task, tokenizer, lengths, depths, samples, NEEDLE_SEED.format(seed), answer, corpus)
    by_length = [sum(row) / len(row) for row in grid]
    where = {"lengths": list(lengths), "depths": list(depths)}
    percent = sum(by_length) / len(by_length)
    scores = {"task": task, "percent": percent, "percent_by_length": by_length, "grid": grid}
    return scores | where | about | {"samples": samples, "seed": seed}


def _passages(
    task: str,
    model: LanguageModel,
    tokenizer: Tokenizer,
    folder: Path | None,
    length: int,
    progress: Callable[[int, int], None],
) -> Result:
    if folder is None:
        raise ValueError(f"{task} asks about documents; expected a folder with {task}.jsonl (--passages)")
    found = passages.read_passages(folder, task)
    questions = passages.passage_samples(found, tokenizer, length)
    if not questions:
        raise ValueError(f"no answer in {folder / task!s}.jsonl stands in its own context")
    answer = greedy(model, tokenizer, passages.NEW_TOKENS, ["\n"], progress=progress)
    left_out = {"without_answer": len(found) - len(questions), "data_sha256": sha256_of(folder / f"{task}.jsonl")}
    percent = passages.score(questions, answer)
    return {"task": task, "percent": percent, "length": length, "samples": len(questions)} | left_out


def _haystack(
    task: str, given: needles.Haystack | None, token_file: TokenFile, tokenizer: Tokenizer
) -> tuple[Result, str | None]:
    """What results say of a needle task's haystack, and its text where that is natural."""
    kind = needles.needle_task(task).haystack
    if kind != "essays":
        return {"haystack": "one line repeated" if kind == "line" else "other needles"}, None
    haystack = given or needles.Haystack(needles.essays(token_file, tokenizer), "validation documents")
    return {"haystack": haystack.name, "haystack_sha256": haystack.sha256}, haystack.text


def table(results: Iterable[Result]) -> "Table":
    """The results for a terminal: a row for each, perplexity followed by its curve along the context."""
    from rich.table import Column, Table

    out = Table("task", Column("result", no_wrap=True), "on")
    for result in results:
        task = result["task"]
        if task == "perplexity":
            on = f"{result['tokens']:,} tokens, windows of {result['length']:,}"
            out.add_row(task, f"{result['perplexity']:.3f}{_bits(result)}", on)
            for bucket in result["by_position"]:
                where = f"places {bucket['start']:,} to {bucket['stop'] - 1:,}"
                out.add_row("", f"{bucket['nats']:.4f} nats{_bits(bucket)}", where)
        elif task.startswith(HARNESS):
            for metric, value in result.items():
                if isinstance(value, float):
                    out.add_row(task, f"{metric} {value:.4f}", f"texts of at most {result['max_length']:,} tokens")
        elif task == "recall":
            on = f"{result['samples']} samples, {result['pairs']} pairs each"
            out.add_row(task, f"{result['percent']:.1f} %, chance {result['chance_percent']:.1f} %", on)
        elif task in passages.PASSAGE_TASKS:
            on = f"{result['samples']} passages of {result['length']:,} tokens round the answer"
            out.add_row(task, f"{result['percent']:.1f} %", on)
        else:
            name = task
            for length, percent in zip(result["lengths"], result["percent_by_length"]):
                on = f"{result['samples']} prompts of {length:,} tokens, {result['haystack']}"
                out.add_row(name, f"{percent:.1f} %", on)
                name = ""
    return out


def _bits(result: Result) -> str:
    return "" if result["bits_per_byte"] is None else f", {result['bits_per_byte']:.4f} bits/byte"
