"""The needle tasks follow RULER; their scoring tells a copy from a guess."""

import re

import pytest

from gdn2.data import load_tokenizer
from gdn2.evaluation import retrieval
from gdn2.evaluation.retrieval import (
    ANSWER_TOKENS,
    GRASS,
    NEEDLE_TASKS,
    NeedleSample,
    RecallSample,
    exact,
    needle_documents,
    niah_samples,
    recall_documents,
    recall_samples,
    score,
)

BYTES = load_tokenizer("bytes")
ESSAY = " ".join(f"Sentence {i} says something of no importance, and ends." for i in range(300))


def samples(kind, length=2_048, n=20, seed=0):
    return niah_samples(kind, BYTES, length, n, seed, ESSAY)


def copy_oracle(prompts):
    """Answers from the prompt's text alone."""
    replies = []
    for prompt in prompts:
        key = re.search(r"What is the special magic \w+ for (\S+) mentioned", prompt)[1]
        replies.append(re.search(rf"One of the special magic \w+ for {key} is: (\S+)\.", prompt)[1])
    return replies


@pytest.mark.parametrize("kind", NEEDLE_TASKS)
def test_copy_oracle_scores_100_and_null_model_0(kind):
    drawn = samples(kind)
    assert score(drawn, copy_oracle) == 100
    assert score(drawn, lambda prompts: [reply.upper() for reply in copy_oracle(prompts)]) == 100  # case does not count
    assert score(drawn, lambda prompts: ["" for _ in prompts]) == 0


def test_single_1_prompt_is_rulers_word_for_word():
    (sample,) = samples("niah_single_1", n=1)
    first, *lines, last = sample.prompt.split("\n")
    assert first == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    (needle,) = [line for line in lines if line != GRASS]
    key = re.fullmatch(rf"One of the special magic numbers for (\w+-\w+) is: {sample.answers[0]}\.", needle)[1]
    assert last == (
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    assert 10**6 <= int(sample.answers[0]) < 10**7


@pytest.mark.parametrize("kind", NEEDLE_TASKS)
@pytest.mark.parametrize("length", [1_024, 2_048, 3_000])
def test_prompt_answer_and_new_tokens_fill_the_length(kind, length):
    for sample in samples(kind, length, n=5):
        used = len(sample.prompt) + len(sample.answers[0]) + ANSWER_TOKENS
        assert length - len(GRASS) - 1 <= used <= length  # one more line or word would not fit


def sentences(text):
    return len([part for part in re.split(r"(?<=[.!?]) ", text.strip()) if part])


def test_needle_stands_before_its_share_of_the_sentences():
    for sample in samples("niah_single_1", n=40):
        lines = sample.prompt.split("\n")[1:-1]
        (at,) = [i for i, line in enumerate(lines) if line != GRASS]
        assert at == int((len(lines) - 1) * sample.depth / 100)
    for sample in samples("niah_single_2", n=40):
        needle = r"One of the special magic numbers for \S+ is: \d+\."
        before, after = (sentences(part) for part in re.split(needle, sample.prompt.split("\n")[1]))
        assert before == int((before + after) * sample.depth / 100)


def test_depths_are_40_even_values():
    assert len(set(retrieval.DEPTHS)) == 40
    assert (retrieval.DEPTHS[0], retrieval.DEPTHS[-1]) == (0, 100)
    assert len({sample.depth for sample in samples("niah_single_1", n=200)}) > 30


def test_single_3_hides_version_4_uuids():
    for sample in samples("niah_single_3", n=5):
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", sample.answers[0])
        assert sample.prompt.endswith("mentioned in the provided text is")
        assert "A special magic uuid is hidden" in sample.prompt


def test_multikey_1_has_four_keys_and_asks_for_one():
    for sample in samples("niah_multikey_1", n=5):
        needles = re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", sample.prompt)
        assert len(dict(needles)) == 4
        assert sample.answers[0] in dict(needles).values()


def test_same_seed_same_samples():
    assert samples("niah_multikey_1", seed=3) == samples("niah_multikey_1", seed=3)
    assert samples("niah_multikey_1", seed=3) != samples("niah_multikey_1", seed=4)
    assert samples("niah_single_1", n=3) == samples("niah_single_1", n=5)[:3]


def test_short_corpus_wraps_round():
    (sample,) = niah_samples("niah_single_2", BYTES, 2_048, 1, 0, "Few words. They come again.")
    assert sample.prompt.count("They come again.") > 10


def test_words_end_sentences_and_paragraphs():
    assert retrieval._words("One two. Three\n\nfour\nfive") == ["One", "two.\n", "Three\n", "four", "five\n"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: niah_samples("niah_single_9", BYTES, 2_048, 1, 0), "needle task 'niah_single_9'; expected one of"),
        (lambda: niah_samples("niah_single_2", BYTES, 2_048, 1, 0), "corpus is None; expected natural text"),
        (lambda: niah_samples("niah_single_2", BYTES, 2_048, 1, 0, " \n"), "expected natural text"),
        (lambda: niah_samples("niah_single_1", BYTES, 2_048, 0, 0), "n is 0; expected at least 1 sample"),
        (lambda: niah_samples("niah_single_1", BYTES, 100, 1, 0), r"length is 100 tokens; expected at least \d+"),
        (lambda: recall_samples(0, 0), "n is 0; expected at least 1 sample"),
        (lambda: recall_samples(1, 0, pairs=11), "pairs is 11; expected 1 to 10"),
        (lambda: recall_samples(1, 0, pairs=0), "pairs is 0; expected 1 to 10"),
        (lambda: score(samples("niah_single_1", n=2), lambda prompts: ["one"]), "1 replies to 2 prompts"),
        (lambda: exact(recall_samples(2, 0), lambda prompts: ["one"]), "1 replies to 2 prompts"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_score_counts_the_share_of_gold_strings():
    two = [NeedleSample("p", ("Aa", "bb"), 0), NeedleSample("q", ("cc",), 0)]
    assert score(two, lambda prompts: ["xaAx", "CC"]) == 75


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


def test_needle_documents_answer_their_question():
    documents = list(needle_documents(3, 700, BYTES, seed=0))
    assert len(documents) == 3
    for text in documents:
        key, answer = re.search(r"for (\S+) mentioned in the provided text is (\d{7})\.$", text).groups()
        assert f"for {key} is: {answer}." in text
        assert len(text) <= 702  # the space and the full stop round the answer are not in the budget
