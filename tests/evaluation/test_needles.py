"""The needle tasks follow RULER; their scoring tells a copy from a guess."""

import json
import re

import pytest
from small import MODELS, small_model

from gdn2.data import load_tokenizer
from gdn2.evaluation import needles
from gdn2.evaluation.answers import greedy
from gdn2.evaluation.needles import (
    ANSWER_TOKENS,
    DEPTHS,
    GRASS,
    NEEDLE_TASKS,
    NeedleSample,
    largest_fit,
    needle_documents,
    niah_grid,
    niah_samples,
    read_haystack,
    score,
)
from gdn2.evaluation.words import ADJECTIVES, NOUNS

BYTES = load_tokenizer("bytes")
ESSAY = " ".join(f"Sentence {i} says something of no importance, and ends." for i in range(300))
NEEDLE = r"One of the special magic \w+ for (\S+) is: (\S+)\."
ONE_ANSWER = [name for name, task in NEEDLE_TASKS.items() if task.queries * task.values == 1]


def samples(name, length=2_048, n=20, seed=0, depth=None):
    return niah_samples(name, BYTES, length, n, seed, ESSAY, depth)


def copy_oracle(prompts):
    """Answers from the prompt's text alone."""
    replies = []
    for prompt in prompts:
        asked = re.search(r"What (?:is|are all) the special magic \w+ for (.*?) mentioned", prompt)[1]
        keys = re.split(r", and |, ", asked)
        replies.append(" ".join(value for key, value in re.findall(NEEDLE, prompt) if key in keys))
    return replies


@pytest.mark.parametrize("name", NEEDLE_TASKS)
def test_copy_oracle_scores_100_and_null_model_0(name):
    drawn = samples(name)
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


def test_multiquery_prompt_is_rulers_word_for_word():
    (sample,) = samples("niah_multiquery", n=1)
    first, context, last = sample.prompt.split("\n")
    assert first == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards."
    )
    key_of = {value: key for key, value in re.findall(NEEDLE, context)}
    one, two, three, four = (key_of[answer] for answer in sample.answers)
    asked = f"special magic numbers for {one}, {two}, {three}, and {four} mentioned in the provided text"
    assert last == f"What are all the {asked}? The {asked} are"
    assert sample.depth is None


def test_multivalue_asks_for_all_values_of_one_key():
    for sample in samples("niah_multivalue", n=5):
        found = re.findall(NEEDLE, sample.prompt)
        assert len({key for key, _ in found}) == 1
        assert sorted(value for _, value in found) == sorted(sample.answers)
        assert len(set(sample.answers)) == 4
        assert "What are all the special magic numbers for" in sample.prompt


@pytest.mark.parametrize("name", NEEDLE_TASKS)
@pytest.mark.parametrize("length", [1_024, 2_048, 3_000])
def test_prompt_answer_and_new_tokens_fill_the_length(name, length):
    unit = 110 if NEEDLE_TASKS[name].haystack == "needles" else len(GRASS) + 1
    unit = 140 if name == "niah_multikey_3" else unit
    for sample in samples(name, length, n=5):
        used = len(sample.prompt) + len(" ".join(sample.answers)) + ANSWER_TOKENS
        assert length - unit <= used <= length  # one more line or word would not fit


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_128k_prompts_cost_few_encodings(name):
    calls = []

    class Counted:
        def encode(self, text):
            if len(text) > 50_000:
                calls.append(len(text))
            return BYTES.encode(text)

    drawn = niah_samples(name, Counted(), 131_072, 3, 0, ESSAY)
    assert all(131_072 - 120 < len(sample.prompt) + 7 + ANSWER_TOKENS <= 131_072 for sample in drawn)
    assert len(calls) <= 3 * 8
    if name == "niah_multikey_2":  # and no line gives the key asked for again
        for sample in drawn:
            found = re.findall(NEEDLE, sample.prompt)
            assert len(dict(found)) == len(found) > 1_000


@pytest.mark.parametrize("guess", [1, 50, 10_000])
@pytest.mark.parametrize("limit", [10, 11, 99, 1_000, 4_096])
def test_largest_fit_is_the_last_size_that_fits(guess, limit):
    def tokens(size):  # units of 1 to 5 tokens
        return 10 + sum(1 + i * i % 5 for i in range(size))

    size = largest_fit(tokens, limit, guess, limit)
    assert tokens(size) <= limit < tokens(size + 1)
    assert largest_fit(tokens, limit, guess, 3) == min(size, 3)


def sentences(text):
    return len([part for part in re.split(r"(?<=[.!?]) ", text.strip()) if part])


@pytest.mark.parametrize("depth", [None, 0, 30, 100])
def test_needle_stands_before_its_share_of_the_sentences(depth):
    for sample in samples("niah_single_1", n=10, depth=depth):
        lines = sample.prompt.split("\n")[1:-1]
        (at,) = [i for i, line in enumerate(lines) if line != GRASS]
        share = (len(lines) - 1) * sample.depth / 100
        assert at == (round(share) if depth is None else int(share))  # drawn, the depth is that of a drawn line
    for sample in samples("niah_single_2", n=10, depth=depth):
        needle = r"One of the special magic numbers for \S+ is: \d+\."
        before, after = (sentences(part) for part in re.split(needle, sample.prompt.split("\n")[1]))
        assert before == int((before + after) * sample.depth / 100)
        assert depth is None or sample.depth == depth


def test_depth_is_that_of_the_needle_asked_for():
    for sample in samples("niah_multikey_1", n=10, depth=0):
        asked = re.search(r"What is the special magic \w+ for (\S+) mentioned", sample.prompt)[1]
        assert sample.prompt.split("\n")[1].startswith(f"One of the special magic numbers for {asked} is") or (
            re.findall(NEEDLE, sample.prompt)[1][0] == asked  # another needle was drawn for the same place
        )


def test_drawn_depths_are_rulers_40_in_essays_and_any_line_elsewhere():
    assert (len(set(DEPTHS)), DEPTHS[0], DEPTHS[-1]) == (40, 0, 100)
    found = {sample.depth for sample in samples("niah_single_2", n=200)}
    assert len(found) > 30
    assert found <= set(DEPTHS)
    places = {sample.depth for sample in samples("niah_single_1", n=200)}
    assert len(places) > 15  # of some 17 lines
    assert max(places) < 100  # RULER puts no needle behind the last line


def test_uuids_are_version_4():
    shape = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    for sample in samples("niah_single_3", n=5):
        assert re.fullmatch(shape, sample.answers[0])
        assert "A special magic uuid is hidden" in sample.prompt
    for sample in samples("niah_multikey_3", n=5):
        for key, value in re.findall(NEEDLE, sample.prompt):
            assert re.fullmatch(shape, key)
            assert re.fullmatch(shape, value)


def test_multikey_1_has_four_keys_and_asks_for_one():
    for sample in samples("niah_multikey_1", n=5):
        found = re.findall(NEEDLE, sample.prompt)
        assert len(dict(found)) == 4
        assert sample.answers[0] in dict(found).values()


def test_multikey_2_and_3_are_needles_alone():
    for name in ("niah_multikey_2", "niah_multikey_3"):
        for sample in samples(name, n=5):
            lines = sample.prompt.split("\n")[1:-1]
            assert all(re.fullmatch(NEEDLE, line) for line in lines)
            assert len({re.fullmatch(NEEDLE, line)[1] for line in lines}) == len(lines) > 8


def test_keys_are_single_words_none_twice():
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words)
        assert all(re.fullmatch("[a-z]+", word) for word in words)


def test_same_seed_same_samples():
    assert samples("niah_multikey_1", seed=3) == samples("niah_multikey_1", seed=3)
    assert samples("niah_multikey_1", seed=3) != samples("niah_multikey_1", seed=4)
    assert samples("niah_single_1", n=3) == samples("niah_single_1", n=5)[:3]


def test_short_corpus_wraps_round():
    (sample,) = niah_samples("niah_single_2", BYTES, 2_048, 1, 0, "Few words. They come again.")
    assert sample.prompt.count("They come again.") > 10


def test_words_end_sentences_and_paragraphs():
    assert needles._words("One two. Three\n\nfour\nfive") == ["One", "two.\n", "Three\n", "four", "five\n"]


def test_haystack_is_text_or_rulers_json(tmp_path):
    (tmp_path / "essays.json").write_text(json.dumps({"text": "Some essay."}))
    (tmp_path / "book.txt").write_text("Some book.")
    assert read_haystack(tmp_path / "essays.json").text == "Some essay."
    book = read_haystack(tmp_path / "book.txt")
    assert (book.text, book.name) == ("Some book.", "book.txt")
    assert book.sha256 != read_haystack(tmp_path / "essays.json").sha256
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, message in (("other.json", "neither UTF-8 text nor JSON"), ("empty.txt", "holds no text")):
        with pytest.raises(ValueError, match=message):
            read_haystack(tmp_path / name)


def test_grid_has_a_row_for_each_length_and_a_column_for_each_depth():
    def near_the_end(prompts):
        """Reads the last 330 characters alone, the question and a little more."""
        return [reply if reply in prompt[-330:] else "" for reply, prompt in zip(copy_oracle(prompts), prompts)]

    grid = niah_grid("niah_single_2", BYTES, [1_024, 2_048], [0, 50, 100], 4, 0, near_the_end, ESSAY)
    assert grid == [[0, 0, 100], [0, 0, 100]]
    assert niah_grid("niah_multiquery", BYTES, [1_500], None, 4, 0, copy_oracle, ESSAY) == [[100]]


@pytest.mark.parametrize("kind", ["gdn2", "window"])
def test_batched_answers_are_those_of_each_prompt_alone(kind):
    """Prompts of many lengths, cut where the texts differ: a small model hears little else than the last words."""
    model = small_model(**MODELS[kind])
    prompts = [sample.prompt[: 150 + 31 * i] for i, sample in enumerate(samples("niah_multikey_2", 1_024, n=6))]
    together = greedy(model, BYTES, 8, batch=4)(prompts)
    assert together == [greedy(model, BYTES, 8)([prompt])[0] for prompt in prompts]
    assert len(set(together)) > 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: niah_samples("niah_single_9", BYTES, 2_048, 1, 0), "needle task 'niah_single_9'; expected one of"),
        (lambda: niah_samples("niah_single_2", BYTES, 2_048, 1, 0), "corpus is None; expected natural text"),
        (lambda: niah_samples("niah_single_2", BYTES, 2_048, 1, 0, " \n"), "expected natural text"),
        (lambda: niah_samples("niah_single_1", BYTES, 2_048, 0, 0), "n is 0; expected at least 1 sample"),
        (lambda: niah_samples("niah_single_1", BYTES, 100, 1, 0), r"length is 100 tokens; expected at least \d+"),
        (lambda: samples("niah_single_1", depth=101), "depth is 101; expected percent, 0 to 100"),
        (lambda: samples("niah_multivalue", depth=50), "niah_multivalue asks for several needles; expected no depth"),
        (lambda: score(samples("niah_single_1", n=2), lambda prompts: ["one"]), "1 replies to 2 prompts"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_score_counts_the_share_of_gold_strings():
    two = [NeedleSample("p", ("Aa", "bb"), 0), NeedleSample("q", ("cc",), 0)]
    assert score(two, lambda prompts: ["xaAx", "CC"]) == 75


def test_needle_documents_answer_their_question():
    documents = list(needle_documents(3, 700, BYTES, seed=0))
    assert len(documents) == 3
    for text in documents:
        key, answer = re.search(r"for (\S+) mentioned in the provided text is (\d{7})\.$", text).groups()
        assert f"for {key} is: {answer}." in text
        assert len(text) <= 702  # the space and the full stop round the answer are not in the budget


def test_needle_documents_of_several_tasks_take_turns():
    names = ["niah_single_1", "niah_multikey_2", "niah_multiquery"]
    documents = list(needle_documents(4, 1_000, BYTES, 0, names, ESSAY))
    assert len(documents) == 4
    assert GRASS in documents[0]
    assert "says something" in documents[2]
    assert GRASS in documents[3]
    assert re.search(r"\d{7}, \d{7}, \d{7}, \d{7}\.$", documents[2])
