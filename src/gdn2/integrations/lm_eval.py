"""Our models in EleutherAI's lm-evaluation-harness, without a detour through an export.

    gdn2 eval RUN --tasks lm_eval:piqa,lm_eval:mine --task-path my_tasks/

`HarnessModel` answers the harness's three kinds of question: how likely a continuation is, how likely a whole text is,
and what the model would write. The scores are those of the harness's own "hf" model on the exported run: the same ids,
the same windows, the same cuts. Perplexities of whole texts depend on `max_length`, so results carry it.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gdn2.data import Tokenizer
from gdn2.generate import generate_text
from gdn2.model import LanguageModel

NEW_TOKENS = 256  # of an answer, where the task does not say; as the harness's own models have it
PACKED_TOKENS = 4_096  # at most in one forward pass, whose logits are held, unless one question alone is longer
SAMPLING = {"temperature", "top_k", "top_p", "seed"}

Question = tuple[Any, list[int], list[int]]


class HarnessModel(TemplateLM):
    """A language model as the harness sees it.

    Args:
        max_length: tokens that a question and its answer are cut to, from the left.
        batch: texts written at a time.
        progress: told how many questions of a kind are answered, and of how many.

    Raises:
        ValueError: max_length or batch below 1.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        max_length: int,
        batch: int = 16,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        for name, value in (("max_length", max_length), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected an integer >= 1")
        self.model, self.text, self.max_length, self.batch = model, tokenizer, max_length, batch
        self.progress = progress
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self.text.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return self.text.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Ids of the text; our tokenizers add no special tokens."""
        return self.text.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, in windows of max_length that share no token."""
        questions: list[Question] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.text.encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                questions.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (nats, _) in zip(owners, self._loglikelihood_tokens(questions)):
            totals[index] += nats
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Question], **unused: Any) -> list[tuple[float, bool]]:
        """Of each (anything, context, continuation): nats of the continuation, and whether greedy text would be it."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        whole = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        done = 0
        for part in _parts([len(tokens) - 1 for tokens in whole]):
            read = [torch.tensor(whole[i][:-1]) for i in part]
            cuts = torch.tensor([0, *(len(tokens) for tokens in read)]).cumsum(0)
            hidden, _ = self.model(
                torch.cat(read)[None].to(self._device), cu_seqlens=cuts.to(self._device), output_state=False
            )
            for row, index in enumerate(part):
                length = min(len(requests[index][2]), len(read[row]))
                targets = torch.tensor(whole[index][len(whole[index]) - length :], device=self._device)
                end = int(cuts[row + 1])
                scores = self.model.logits(hidden[0, end - length : end]).log_softmax(-1)
                nats = scores.gather(1, targets[:, None]).sum()
                answers[index] = (float(nats), bool((scores.argmax(-1) == targets).all()))
            done += len(part)
            self.progress(done, len(requests))
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first stop string or the end of the text.

        ValueError for a setting of a task that our sampling does not have, and where no context would fit.
        """
        answers = [""] * len(requests)
        settings = [normalize_gen_kwargs(request.args[1], NEW_TOKENS) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: repr(settings[i]))
        done = 0
        for _, group in groupby(order, key=lambda i: repr(settings[i])):
            same = list(group)
            for start in range(0, len(same), self.batch):
                part = same[start : start + self.batch]
                for index, text in zip(part, self._write([requests[i].args[0] for i in part], settings[part[0]])):
                    answers[index] = text
                done += len(part)
                self.progress(done, len(requests))
        return answers

    def _write(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        options = dict(settings)
        stops, tokens = options.pop("until") or [], int(options.pop("max_gen_toks"))
        if not options.pop("do_sample", False):
            options["temperature"] = 0.0
        unknown = options.keys() - SAMPLING
        if unknown:
            raise ValueError(f"the task sets {sorted(unknown)[0]!r}; expected some of {', '.join(sorted(SAMPLING))}")
        room = self.max_length - tokens
        if room < 1:
            raise ValueError(f"max_length is {self.max_length}; expected more than the {tokens} new tokens of the task")
        prompts: list[Any] = [self.text.encode(context)[-room:] for context in contexts]
        steps = generate_text(
            self.model, _Encoded(self.text), prompts, tokens, stop_strings=[stop for stop in stops if stop], **options
        )
        return ["".join(pieces) for pieces in zip(*steps)]


class _Encoded:
    """A tokenizer for `generate_text` whose texts are token ids already: cutting ids is not cutting text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.end_of_text, self.stream = tokenizer.end_of_text, tokenizer.stream

    def encode(self, text: Any) -> list[int]:
        return list(text)


def _parts(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in order, cut so that the lengths of each part come to at most PACKED_TOKENS, or one is longer alone."""
    parts: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not parts or length > room:
            parts.append([])
            room = PACKED_TOKENS
        parts[-1].append(index)
        room -= length
    return parts


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    max_length: int,
    task_path: Path | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of the harness.

    Args:
        tasks: their names there.
        max_length: see `HarnessModel`.
        task_path: a folder with further tasks' YAML files.
        limit: documents of each task at most.

    Returns:
        for each task (and for the subtasks of a group) its metrics, as the harness names them without ",none", and
        max_length.

    Raises:
        ValueError: a name that is no task, or data that cannot be loaded.
    """
    manager = None
    if task_path is not None:  # reading the harness's own thousands of files takes long: only where they are needed
        manager = TaskManager(include_path=str(task_path), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if task_path is None else str(task_path))
    for name in tasks:
        if name not in manager.all_tasks:
            raise ValueError(f"lm_eval task is {name!r}; expected one that the harness or --task-path knows")
    harness = HarnessModel(model, tokenizer, max_length, progress=progress)
    try:
        found = simple_evaluate(
            harness, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    except (OSError, ConnectionError) as error:
        raise ValueError(f"the data of {', '.join(tasks)} cannot be loaded: {error}") from error
    return {
        name: {
            metric.removesuffix(",none"): value
            for metric, value in metrics.items()
            if isinstance(value, int | float) and "_stderr" not in metric and metric != "sample_len"
        }
        | {"max_length": max_length}
        for name, metrics in found["results"].items()
    }
