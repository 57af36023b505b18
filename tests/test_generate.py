"""Generation is exact for every row of a batch, reproducible, and leaves the model as it was."""

from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gdn2.config import ModelConfig
from gdn2.data import load_tokenizer
from gdn2.generate import StopStrings, generate, generate_text, sample_tokens
from gdn2.model import LanguageModel

BYTES = load_tokenizer("bytes")
SMALL = {"vocab_size": 257, "d_model": 32, "mlp_width": 48, "num_layers": 4, "num_heads": 2, "key_dim": 8}
SMALL |= {"value_dim": 8, "attention_heads": 2}
PROMPTS = [[1, 2, 3], [4], list(range(40)), [9, 8, 7], [5] * 17]


def small_model(**changes):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SMALL | changes))
    for weight in model.parameters():  # the initialisation's small logits would make every text the same
        if weight.dim() > 1:
            weight.data.mul_(3)
    return model


@pytest.fixture(scope="module")
def hybrid():
    return small_model(cell=("mixer", "attention"), window=16)


class Passes(NamedTuple):
    count: torch.Tensor  # [N], forward passes so far


class Recite(nn.Module):
    """Says each row's text, whatever the prompt: its byte i after i + 1 forward passes. Notes the shapes it read."""

    def __init__(self, texts):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=257, window=None, layer_kinds=("mixer",))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.texts = [[*text.encode(), 256] for text in texts]
        self.read: list[tuple[int, int]] = []

    def forward(self, tokens, state=None):
        self.read.append(tuple(tokens.shape))
        rows, T = tokens.shape
        count = torch.zeros(rows, dtype=torch.int64) if state is None else state[0].count
        return count[:, None, None].expand(rows, T, 1).double(), (Passes(count + 1),)

    def initial_state(self, batch, dtype=None):
        return (Passes(torch.zeros(batch, dtype=torch.int64)),)

    def step(self, tokens, state):
        hidden, (after,) = self(tokens, state)
        state[0].count.copy_(after.count)
        return self.logits(hidden[:, -1])

    def logits(self, hidden):
        ids = [text[min(n, len(text) - 1)] for text, n in zip(self.texts, hidden[:, 0].int().tolist())]
        return nn.functional.one_hot(torch.tensor(ids), 257).float()


def rows_of(steps):
    """The tokens of each row, None left out."""
    return [[token for token in row if token is not None] for row in zip(*steps)]


CELLS = [
    {"cell": ("mixer",)},
    {"cell": ("mixer", "attention"), "window": 16},
    {"cell": ("mixer", "attention"), "window": None},
]


@pytest.mark.parametrize("changes", CELLS, ids=["recurrent", "window", "full"])
def test_row_of_a_batch_equals_its_prompt_alone(changes):
    model = small_model(**changes).double()  # float64: sums of another order must not flip a near tie
    together = rows_of(generate(model, PROMPTS, 12, temperature=0, chunk=8))
    alone = [rows_of(generate(model, [prompt], 12, temperature=0, chunk=8))[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(row) for row in together}) > 1


@pytest.mark.parametrize("changes", CELLS, ids=["recurrent", "window", "full"])
def test_greedy_equals_rereading_the_whole_text(changes):
    model = small_model(**changes).double()
    prompt = list(range(40))
    (new,) = rows_of(generate(model, [prompt], 12, temperature=0, chunk=8))
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(12):
            hidden, _ = model(torch.tensor([text]))
            text.append(int(model.logits(hidden[:, -1]).argmax()))
    assert new == text[40:]


def test_chunk_does_not_change_the_text(hybrid):
    texts = [rows_of(generate(hybrid, PROMPTS, 12, temperature=0, chunk=chunk)) for chunk in (1, 7, 512)]
    assert texts[0] == texts[1] == texts[2]


def test_same_seed_same_text_whatever_the_other_rows(hybrid):
    sampled = rows_of(generate(hybrid, PROMPTS, 20, seed=5))
    assert sampled == rows_of(generate(hybrid, PROMPTS, 20, seed=5))
    assert sampled != rows_of(generate(hybrid, PROMPTS, 20, seed=6))
    others = rows_of(generate(hybrid, [[7], PROMPTS[1], [0, 0]], 20, seed=5))
    assert others[1] == sampled[1]
    assert rows_of(generate(hybrid, [PROMPTS[1]], 20, seed=6))[0] == sampled[1]  # row i draws with seed + i


def test_without_a_seed_texts_differ(hybrid):
    assert rows_of(generate(hybrid, [[1]], 30)) != rows_of(generate(hybrid, [[1]], 30))


def test_global_random_state_is_left_alone(hybrid):
    before = torch.get_rng_state()
    list(generate(hybrid, PROMPTS, 3, seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_equal_prompts_sample_different_texts(hybrid):
    a, b = rows_of(generate(hybrid, [[1], [1]], 20, seed=0))
    assert a != b


def test_stop_token_ends_its_row_alone():
    model = Recite(["ab", "abcd"])
    a, b, c, d = b"abcd"
    steps = list(generate(model, [[0], [0]], 10, temperature=0, stop_tokens=[256]))
    assert steps == [[a, a], [b, b], [None, c], [None, d]]


def test_steps_stop_at_max_new_tokens():
    assert len(list(generate(Recite(["abcdef"]), [[0]], 4, temperature=0))) == 4


def test_prefill_reads_chunks_then_single_tokens():
    model = Recite(["abc", "abc"])
    list(generate(model, [[0] * 10, [0] * 6], 3, temperature=0, chunk=4))
    assert model.read == [(2, 4), (1, 4), (1, 2), (1, 2), (2, 1), (2, 1)]  # pieces of one length share a pass


def test_tokens_come_one_step_at_a_time():
    model = Recite(["abcdef"])
    steps = generate(model, [[0]], 6, temperature=0)
    next(steps)
    assert model.read == [(1, 1)]  # the prompt; no step is taken before it is asked for


def test_state_does_not_grow_with_the_text(hybrid):
    sizes = set()
    state = None
    with torch.inference_mode():
        for token in generate(hybrid, [[1]], 40, seed=0):
            _, state = hybrid(torch.tensor([token]), state)
            sizes.add(sum(tensor.numel() for block in state for tensor in block))
    assert len(sizes) == 1


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_comes_back(training):
    model = Recite(["abc"]).train(training)
    steps = generate(model, [[0]], 3, temperature=0)
    next(steps)
    assert not model.training
    assert not torch.is_inference_mode_enabled()  # the caller's own work between steps is not touched
    steps.close()
    assert model.training == training


def probabilities(logits, draws=4_000, **settings):
    """Frequencies over evenly spread uniforms: exact to 1 / draws."""
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    chosen = sample_tokens(torch.tensor(logits).expand(draws, -1), uniform=uniform, **settings)
    return torch.bincount(chosen, minlength=len(logits)) / draws


P = torch.tensor([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"temperature": 0}, torch.tensor([0.0, 1, 0, 0])),
        ({"temperature": 1e-300}, torch.tensor([0.0, 1, 0, 0])),
        ({"top_k": 2}, torch.tensor([0, 4, 0, 3]) / 7),
        ({"top_k": 9}, P),
        ({"top_p": 0.65}, torch.tensor([0, 4, 0, 3]) / 7),  # 0.4 + 0.3 reach it
        ({"top_p": 0.75}, torch.tensor([0, 4, 2, 3]) / 9),
        ({"top_p": 1e-9}, torch.tensor([0.0, 1, 0, 0])),
        ({"top_k": 2, "top_p": 0.5}, torch.tensor([0.0, 1, 0, 0])),  # 4/7 among the two reaches it
    ],
)
def test_sampling_follows_the_distribution(settings, expected):
    # Three borders between four tokens can each misplace one of 4,000 draws.
    torch.testing.assert_close(probabilities(P.log().tolist(), **settings), expected, atol=1e-3, rtol=0)


def test_extreme_uniforms_choose_possible_tokens():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]).repeat(2, 1)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, 1.0, 0, 1.0, uniform).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts is []; expected at least one prompt"),
        ({"prompts": [[1], []]}, "prompts[1] is []; expected at least one token"),
        ({"prompts": [[1], [257]]}, "prompts[1]: token is 257; expected an id in [0, 257)"),
        ({"prompts": [[-1]]}, "prompts[0]: token is -1; expected an id in [0, 257)"),
        ({"stop_tokens": [300]}, "stop_tokens: token is 300; expected an id in [0, 257)"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected an integer >= 1"),
        ({"temperature": -0.5}, "temperature is -0.5; expected a number >= 0"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number >= 0"),
        ({"top_k": -1}, "top_k is -1; expected an integer >= 0"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a number in (0, 1]"),
        ({"top_p": 1.5}, "top_p is 1.5; expected a number in (0, 1]"),
        ({"seed": -1}, "seed is -1; expected an integer in [0, 2**63), or None"),
        ({"chunk": 0}, "chunk is 0; expected an integer >= 1"),
    ],
)
def test_bad_arguments_are_named_at_the_call(change, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 1} | change
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        generate(Recite(["a"]), **arguments)
    assert message in str(error.value)


def test_nan_logits_are_an_error():
    model = Recite(["abc"])
    model.logits = lambda hidden: torch.full((1, 257), torch.nan)
    with pytest.raises(ValueError, match="a logit is nan; expected numbers"):
        next(generate(model, [[0]], 3))


TEXT = "say yes, then STOP and no more"


@given(st.lists(st.integers(0, len(TEXT)), max_size=12), st.sampled_from(["STOP", "yes, t", "more!", "s", "ST"]))
def test_stop_strings_do_not_depend_on_the_pieces(cuts, stop):
    def let_through(pieces):
        stops = StopStrings([stop, "OP a"])
        return "".join(map(stops.feed, pieces)) + stops.flush(), stops.stopped

    cuts = [0, *sorted(cuts), len(TEXT)]
    whole = let_through([TEXT])
    assert let_through([TEXT[a:b] for a, b in pairwise(cuts)]) == whole
    assert let_through(TEXT) == whole
    assert whole[0] == TEXT[: min(at for s in (stop, "OP a") if (at := TEXT.find(s)) >= 0)]


def test_stop_strings_hold_back_only_what_may_become_one():
    stops = StopStrings(["\n\n"])
    assert [stops.feed(piece) for piece in ["a", "\n", "b", "\n", "\n", "c"]] == ["a", "", "\nb", "", "", ""]
    assert stops.stopped
    assert stops.flush() == ""


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop strings is"):
        StopStrings(["a", ""])


def texts(model, prompts, n=20, **settings):
    return ["".join(row) for row in zip(*generate_text(model, BYTES, prompts, n, temperature=0, **settings))]


def test_text_ends_at_end_of_text_or_before_a_stop_string():
    assert texts(Recite(["naïve – yes"]), ["x"]) == ["naïve – yes"]
    assert texts(Recite(["naïve – yes", "noSTOP more", "endST"]), ["x"] * 3, stop_strings=["STOP"]) == [
        "naïve – yes",
        "no",
        "endST",  # what was held back comes at the end
    ]


def test_no_step_is_taken_once_every_text_has_stopped():
    model = Recite(["abSTOPabcdefghijklmnop"]).train()
    assert texts(model, ["x"], stop_strings=["STOP"]) == ["ab"]
    assert len(model.read) == 6
    assert model.training


def test_pieces_are_whole_characters():
    pieces = [row[0] for row in generate_text(Recite(["–é"]), BYTES, ["x"], 20, temperature=0)]
    assert pieces == ["", "", "–", "", "é", ""]


def test_cut_character_at_the_end_is_marked():
    assert texts(Recite(["–"]), ["x"], n=2) == ["�"]


def test_empty_prompt_starts_from_end_of_text(hybrid):
    (from_text,) = texts(hybrid, [""], n=8)
    assert BYTES.decode(rows_of(generate(hybrid, [[256]], 8, temperature=0, stop_tokens=[256]))[0]) == from_text
