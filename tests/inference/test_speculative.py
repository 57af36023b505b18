"""Speculative text is the model's own greedy text, whatever the draft says, in fewer forward passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import MODELS, prompt, small_model

from gdn2.generate import generate
from gdn2.inference import DraftModel, PrefixCache, PromptLookup, speculate

PROMPTS = [prompt(3), prompt(40, seed=1), [5] * 17]


def greedy(model, tokens, n, **options):
    return [token for (token,) in generate(model, [tokens], n, temperature=0, **options)]


def speculated(*arguments, **options):
    return [token for part in speculate(*arguments, **options) for token in part.tokens]


class Wrong:
    """Knows the right text and says so up to `right` tokens, then something else."""

    def __init__(self, text, right, vocab=257):
        self.text, self.right, self.vocab = text, right, vocab

    def propose(self, tokens, n):
        rest = self.text[len(tokens) : len(tokens) + n]
        return [t if i < self.right else (t + 1) % self.vocab for i, t in enumerate(rest)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_with_a_draft_equals_that_without(name):
    # float64: a chunk and a step round differently, which must not flip a near tie.
    model = small_model(**MODELS[name]).double()
    drafts = {
        "lookup": PromptLookup,
        "another model": lambda: DraftModel(small_model(seed=1).double()),
        "itself": lambda: DraftModel(model),
    }
    for tokens in PROMPTS:
        expected = greedy(model, tokens, 16)
        for draft in drafts.values():
            assert speculated(model, tokens, 16, draft(), lookahead=5) == expected


def test_greedy_text_is_the_same_in_float32():
    model = small_model(**MODELS["window"])
    for seed in range(4):
        tokens = prompt(20, seed)
        assert speculated(model, tokens, 30, PromptLookup()) == greedy(model, tokens, 30)


@pytest.fixture(scope="module")
def window():
    model = small_model(**MODELS["window"]).double()
    return model, greedy(model, PROMPTS[0], 30)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), st.integers(1, 7), st.integers(1, 20))
def test_any_accepted_length_rolls_back_to_the_same_text(window, right, lookahead, n):
    model, text = window
    expected = text[:n]
    draft = Wrong(PROMPTS[0] + text, right)
    rounds = list(speculate(model, PROMPTS[0], n, draft, lookahead))
    assert [token for part in rounds for token in part.tokens] == expected
    full = 1 + min(right, lookahead)  # tokens of a round that is not cut off at the end
    assert [len(part.tokens) for part in rounds[1:-1]] == [full] * (len(rounds) - 2)


def test_each_round_is_one_pass_and_its_length_is_bounded():
    model = small_model()
    passes = []
    model.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    text = PROMPTS[0] + greedy(model, PROMPTS[0], 60)
    del passes[:]
    rounds = list(speculate(model, PROMPTS[0], 60, Wrong(text, right=4), lookahead=4))
    assert len(passes) == len(rounds) == 13  # the prompt's token, eleven whole rounds, the rest
    assert max(passes) == 5
    del passes[:]
    rounds = list(speculate(model, PROMPTS[0], 60, Wrong(text, right=0), lookahead=4))
    assert len(rounds) == 60
    assert max(passes) <= 4 + 1 + 4  # what was rolled back, the last token, the proposals
    assert len(passes) <= 60 * 1.25 + 1  # now and then what was rolled back is read for good


def test_stop_token_ends_the_text():
    model = small_model().double()
    text = greedy(model, PROMPTS[1], 30)
    for stop in (text[0], text[11]):
        expected = greedy(model, PROMPTS[1], 30, stop_tokens=[stop])
        draft = Wrong(PROMPTS[1] + text, right=5)
        assert speculated(model, PROMPTS[1], 30, draft, stop_tokens=[stop]) == expected


def test_prefix_cache_does_not_change_the_text():
    model, cache = small_model().double(), PrefixCache(2**30, block=8)
    for tokens in (PROMPTS[1], [*PROMPTS[1], 3, 4], PROMPTS[1]):
        assert speculated(model, tokens, 16, PromptLookup(), cache=cache, chunk=8) == greedy(model, tokens, 16)
    assert len(cache) > 5


def test_draft_model_proposes_its_greedy_text():
    model = small_model().double()
    draft = DraftModel(model)
    text = PROMPTS[1] + greedy(model, PROMPTS[1], 12)
    for length in (40, 43, 44, 42, 40):  # on, on, and back again
        assert draft.propose(text[:length], 5) == text[length : length + 5]
    other = prompt(10, seed=9)
    assert draft.propose(other, 5) == greedy(model, other, 5)


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 9, 2, 3, 1, 2], 2, [9, 2]),  # the longer match, not the latest 2
        ([1, 2, 9, 1, 2, 8, 1, 2], 1, [8]),  # of equal ones the latest
        ([5, 5], 4, [5]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([256, 1, 7, 256, 1], 1, [7]),
        ([0, 256, 3, 1], 2, []),  # the bytes of 0, 256 hold those of 1 at an odd place
    ],
)
def test_lookup_finds_what_followed_last_time(text, n, expected):
    assert PromptLookup().propose(text, n) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt is empty; expected at least one token"),
        ({"prompt": [257]}, r"prompt: token is 257; expected an id in \[0, 257\)"),
        ({"stop_tokens": [-1]}, "stop_tokens: token is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected an integer >= 1"),
        ({"lookahead": 0}, "lookahead is 0; expected an integer >= 1"),
    ],
)
def test_bad_arguments_are_named_at_the_call(change, message):
    arguments = {"prompt": [1], "max_new_tokens": 1, "draft": PromptLookup()} | change
    with pytest.raises(ValueError, match=message):
        speculate(small_model(), **arguments)


def test_proposal_outside_the_vocabulary_is_an_error():
    class Foreign:
        def propose(self, tokens, n):
            return [300]

    with pytest.raises(ValueError, match="token is 300"):
        list(speculate(small_model(), [1], 9, Foreign()))


def test_nan_logits_are_an_error():
    model = small_model()
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="a logit is nan; expected numbers"):
        next(speculate(model, [1], 3, PromptLookup()))
