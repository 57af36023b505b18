"""Every task's answers are what an oracle reads from the tokens alone, one sequence after the other."""

from itertools import permutations

import pytest
import torch

from gdn2.data.synthetic import MQAR, S5, TASKS, Deletion, Overwrite, Parity, Sharing
from gdn2.data.synthetic.questions import ASK, DELETE, FIRST_KEY, NONE

SMALL = {
    "mqar": MQAR(vocab_size=64, shortest=16, noise=False),
    "mqar, noise": MQAR(),
    "overwrite": Overwrite(keys=8, values=16, rewrites=3),
    "sharing": Sharing(parts=24, values=16),
    "sharing, two distractors": Sharing(parts=24, values=16, distractors=2),
    "deletion": Deletion(keys=8, values=16),
    "parity": Parity(),
    "s5": S5(),
    "s5, swaps": S5(swaps=True),
}
LOADS = (1, 2, 5, 8)


def draw(task, load, batch=32, seed=0):
    return task.draw(load, batch, torch.Generator().manual_seed(seed))


def rows(questions):
    return zip(*(x.tolist() for x in questions))


def records(tokens, width):
    """What is written and what is asked; the questions begin with the first ASK."""
    start = tokens.index(ASK)
    cut = lambda part: [tuple(part[i : i + width]) for i in range(0, len(part), width)]  # noqa: E731
    return cut(tokens[:start]), cut(tokens[start:])


def oracle(name, load, tokens, positions):
    kind = name.split(",")[0]
    if kind == "mqar":
        known = dict(zip(tokens[0 : 2 * load : 2], tokens[1 : 2 * load : 2]))
        return [known[tokens[p]] for p in positions]
    if kind == "parity":
        return [sum(tokens[: p + 1]) % 2 for p in positions]
    if kind == "s5":
        elements, product, answers = list(permutations(range(5))), tuple(range(5)), []
        for token in tokens:
            product = tuple(elements[token][x] for x in product)
            answers.append(elements.index(product))
        return answers
    memory = {}
    written, asked = records(tokens, 3 if kind == "sharing" else 2)
    for *key, value in written:
        if key == [DELETE]:
            assert memory[(value,)] != NONE, "deleted before it was written, or twice"
            memory[(value,)] = NONE
        else:
            memory[tuple(key)] = value
    assert all(first == ASK for first, *_ in asked)
    assert positions == [i for i in range(len(tokens)) if i + 1 == len(tokens) or tokens[i + 1] == ASK][-len(asked) :]
    return [memory[tuple(key)] for _, *key in asked]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", SMALL)
def test_answers_can_be_read_from_the_tokens(name, load):
    task = SMALL[name]
    questions = draw(task, load)
    assert all(x.dtype == torch.int64 for x in questions)
    assert questions.tokens.min() >= 0
    assert max(questions.tokens.max(), questions.answers.max()) < task.vocab_size
    for tokens, positions, answers in rows(questions):
        assert oracle(name, load, tokens, positions) == answers


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_questions(name):
    first, again, other = (draw(SMALL[name], 5, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.tokens, other.tokens)
    assert len({tuple(row) for row in first.tokens.tolist()}) > 16  # rows differ among themselves


@pytest.mark.parametrize("name", TASKS)
def test_usual_sizes_fit_large_loads(name):
    questions = draw(TASKS[name], 64, batch=2)
    assert questions.answers.shape == questions.positions.shape == (2, 64)


def test_mqar_has_the_lengths_of_zoology():
    assert [MQAR().length(load) for load in (4, 16, 32, 64, 128, 256)] == [64, 64, 128, 256, 512, 1_024]
    assert draw(MQAR(), 32, batch=2).tokens.shape == (2, 128)


def test_mqar_asks_each_key_once_and_has_no_other_key_twice():
    for tokens, positions, _ in rows(draw(MQAR(vocab_size=64, shortest=64, noise=False), 8)):
        keys, values = tokens[0:16:2], tokens[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert sorted(tokens[p] for p in positions) == sorted(keys)
        assert all(1 <= k < 32 <= v < 64 for k, v in zip(keys, values))
        assert len(set(positions)) == 8
        assert all(p >= 16 and p % 2 == 0 for p in positions)
        assert sum(t != 0 for t in tokens) == 24


def test_mqar_gaps_follow_the_power_law():
    """With one pair the first of 31 places has weight 1 / sum(x ** -0.99): 0.25. With power 1 all are alike."""
    for power, expected in ((0.01, 1 / sum(x**-0.99 for x in range(1, 32))), (1.0, 1 / 31)):
        positions = draw(MQAR(power=power), 1, batch=4_000).positions
        share = float((positions == 2).double().mean())
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4_000) ** 0.5)
    # Which pair is asked for at the first place does not depend on its place among the pairs.
    questions = draw(MQAR(), 8, batch=4_000)
    first = questions.positions.argmin(1).bincount(minlength=8) / 4_000
    assert (first - 1 / 8).abs().max() < 4 * (1 / 8 * 7 / 8 / 4_000) ** 0.5


def test_overwrite_writes_each_key_as_often_as_it_says():
    task = Overwrite(keys=8, values=16, rewrites=3)
    for tokens, _, answers in rows(draw(task, 5)):
        written, asked = records(tokens, 2)
        counts = [key for key, _ in written]
        assert sorted(counts.count(key) for key in set(counts)) == [3] * 5
        assert {key for _, key in asked} == set(counts)
        assert len(answers) == 5
    first_values_right = [
        dict(reversed(records(tokens, 2)[0]))[key] == answer
        for tokens, _, answers in rows(draw(task, 5, batch=64))
        for (_, key), answer in zip(records(tokens, 2)[1], answers)
    ]
    assert sum(first_values_right) / len(first_values_right) < 0.15  # chance: 1 / 16


@pytest.mark.parametrize("distractors", [1, 2, 3])
def test_distractors_share_one_part_and_no_key_comes_twice(distractors):
    for tokens, _, _ in rows(draw(Sharing(parts=24, values=16, distractors=distractors), 5)):
        written, asked = records(tokens, 3)
        keys = [(a, b) for a, b, _ in written]
        assert len(set(keys)) == len(keys) == 5 * (1 + distractors)
        for _, a, b in asked:
            assert sum(key[0] == a for key in keys) == 1 + (distractors + 1) // 2
            assert sum(key[1] == b for key in keys) == 1 + distractors // 2


def test_half_of_the_keys_are_deleted_at_every_distance():
    gaps = []
    for tokens, _, answers in rows(draw(Deletion(keys=64, values=16), 9, batch=200)):
        assert answers.count(NONE) == 4
        written = records(tokens, 2)[0]
        at = {record: i for i, record in enumerate(written)}
        for (first, key), i in at.items():
            if first == DELETE:
                gaps.append(i - next(j for (k, _), j in at.items() if k == key))
    assert min(gaps) == 1
    assert max(gaps) > 8


def test_swaps_are_single_reflections():
    elements = list(permutations(range(5)))
    seen = {elements[t] for t in draw(S5(swaps=True), 64).tokens.flatten().tolist()}
    assert len(seen) == 11
    assert all(sum(x != i for i, x in enumerate(p)) in (0, 2) for p in seen)


@pytest.mark.parametrize(
    ("task", "load", "message"),
    [
        (MQAR(vocab_size=64), 32, "load is 32; expected 1 to 31, keys are half of the 64 tokens"),
        (Overwrite(keys=8), 9, "load is 9; expected 1 to 8, the number of keys"),
        (Sharing(parts=24), 9, "load is 9; expected 1 to 8, 24 parts for 3 distractors each"),
        (Deletion(keys=8), 0, "load is 0; expected 1 to 8"),
        (Parity(), 0, "load is 0; expected 1 to"),
    ],
)
def test_loads_that_do_not_fit_are_named(task, load, message):
    with pytest.raises(ValueError, match=message):
        draw(task, load)


def test_first_key_is_behind_the_marks():
    assert max(ASK, DELETE, NONE) < FIRST_KEY
