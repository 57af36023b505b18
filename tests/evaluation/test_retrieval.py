"""The key-value task tells recall from a guess, and its training documents teach what it asks."""

import re

import pytest

from gdn2.evaluation.retrieval import RecallSample, exact, recall_documents, recall_samples


def recall_oracle(prompts):
    replies = []
    for prompt in prompts:
        shown, _, query = prompt.partition("\n\n")
        replies.append(dict(line.split("=") for line in shown.split("\n"))[query.removesuffix("=")])
    return replies


def test_recall_oracle_scores_100_and_null_model_0():
    drawn = recall_samples(50, seed=0)
    assert exact(drawn, recall_oracle) == 100
    assert exact(drawn, lambda prompts: [reply + "\na=3" for reply in recall_oracle(prompts)]) == 100
    assert exact(drawn, lambda prompts: [reply + "x" for reply in recall_oracle(prompts)]) == 0  # not the whole line
    assert exact(drawn, lambda prompts: ["" for _ in prompts]) == 0


def test_guessing_a_value_seen_scores_chance():
    drawn = recall_samples(2_000, seed=0, pairs=8)
    first_value = exact(drawn, lambda prompts: [prompt[2] for prompt in prompts])
    assert abs(first_value - 100 / 8) < 3  # four standard deviations: 100 * sqrt(1/8 * 7/8 / 2000) = 0.74


def test_recall_sample_begins_a_recall_document():
    shape = re.compile(r"([a-z]=\d\n)+\n([a-z]=\d\n)+")
    documents = list(recall_documents(30, seed=0))
    assert documents == list(recall_documents(30, seed=0))
    assert documents != list(recall_documents(30, seed=1))
    for text in documents:
        assert shape.fullmatch(text)
        shown, again = text.split("\n\n")
        assert sorted(shown.split("\n") * 8) == sorted(again.strip().split("\n"))
    for sample in recall_samples(30, seed=0):
        assert isinstance(sample, RecallSample)
        assert shape.fullmatch(sample.prompt + sample.answer + "\n")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall_samples(0, 0), "n is 0; expected at least 1 sample"),
        (lambda: recall_samples(1, 0, pairs=11), "pairs is 11; expected 1 to 10"),
        (lambda: recall_samples(1, 0, pairs=0), "pairs is 0; expected 1 to 10"),
        (lambda: exact(recall_samples(2, 0), lambda prompts: ["one"]), "1 replies to 2 prompts"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
