"""Who answers the questions: any function from prompts to replies, or a model's own greedy text."""

from collections.abc import Callable, Sequence

from gdn2.data import Tokenizer
from gdn2.generate import generate_text
from gdn2.model import LanguageModel

AnswerFn = Callable[[Sequence[str]], Sequence[str]]


def reply_to_each(prompts: Sequence[str], answer: AnswerFn) -> Sequence[str]:
    """What `answer` says to the prompts. ValueError where it does not say one thing to each."""
    replies = answer(prompts)
    if len(replies) != len(prompts):
        raise ValueError(f"{len(replies)} replies to {len(prompts)} prompts; expected one each")
    return replies


def greedy(
    model: LanguageModel,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    batch: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
    total: int | None = None,
) -> AnswerFn:
    """The model's own answers: greedy continuations, `batch` prompts at a time.

    Prompts of any lengths share a batch without padding, so that each is answered as it would be alone. `progress` is
    told how many prompts are done in all, and of how many: `total`, or those of the one call.
    """
    done = 0

    def answer(prompts: Sequence[str]) -> list[str]:
        nonlocal done
        replies: list[str] = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            steps = generate_text(model, tokenizer, part, max_new_tokens, temperature=0, stop_strings=stop_strings)
            replies += map("".join, zip(*steps))
            done += len(part)
            progress(done, len(prompts) if total is None else total)
        return replies

    return answer
