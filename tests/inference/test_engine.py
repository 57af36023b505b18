"""Each request gets the text that it would get alone, whatever else runs, waits, ends or is cancelled."""

import random

import pytest
import torch
from saved_run import BYTES
from small import MODELS, prompt, small_model

from gdn2.decoding import LEAST_ROOM
from gdn2.generate import generate
from gdn2.inference import Engine, PrefixCache, Request

PROMPTS = [prompt(3), prompt(40, seed=1), [5] * 17, prompt(9, seed=2), [1], prompt(23, seed=3)]


@pytest.fixture(params=["gdn2", "window", "full", "mamba3"], scope="module")
def model(request):
    # float64: a row alone and one among others may sum in another order, which must not flip a near tie.
    return small_model(**MODELS[request.param]).double()


@pytest.fixture(scope="module")
def window():
    return small_model(**MODELS["window"]).double()


def alone(model, request):
    steps = generate(
        model, [request.prompt], request.max_new_tokens, request.temperature, request.top_k, request.top_p,
        seed=request.seed, stop_tokens=[256, *request.stop_tokens],
    )  # fmt: skip
    return [token for (token,) in steps]


def varied(n=14):
    """A request for each prompt, every one with its own sampling, seed and length."""
    ways = [{"temperature": 0.0}, {"top_k": 20}, {"top_p": 0.9, "temperature": 0.8}]
    return [Request(p, n - i, seed=i, **ways[i % 3]) for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_texts_are_those_of_each_request_alone(model, slots):
    requests = varied()
    done = Engine(model, BYTES, slots=slots, chunk=8).complete(requests)
    assert [c.tokens for c in done] == [alone(model, request) for request in requests]
    assert all(c.finish in ("length", "stop") for c in done)
    assert [c.text for c in done] == [BYTES.decode(c.tokens) for c in done]


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_arrivals_and_cancellations_leaves_the_others_texts(window, seed):
    rng = random.Random(seed)
    engine, requests = Engine(window, BYTES, slots=2, chunk=8), varied(9)
    expected = [alone(window, request) for request in requests]
    told, numbers, cancelled = {}, {}, set()
    pending = list(range(len(requests)))
    while pending or not engine.idle:
        for _ in range(rng.randint(0, 2)):
            if pending:
                index = pending.pop(0)
                numbers[engine.submit(requests[index])] = index
        if numbers and rng.random() < 0.15:
            number = rng.choice(sorted(numbers))
            finished = number in told and told[number][-1].finish is not None
            assert engine.cancel(number) == (not finished and number not in cancelled)
            cancelled |= set() if finished else {number}
        for event in engine.step():
            told.setdefault(event.request, []).append(event)
    for number, index in numbers.items():
        tokens = [event.token for event in told[number] if event.token is not None]
        finishes = [event.finish for event in told[number]]
        assert finishes[:-1] == [None] * (len(finishes) - 1)
        assert (finishes[-1] == "cancelled") == (number in cancelled)
        assert tokens == (expected[index][: len(tokens)] if number in cancelled else expected[index])
    assert (engine.running, engine.waiting) == (0, 0)


def test_long_prompt_does_not_stall_the_texts_that_run(window):
    engine = Engine(window, BYTES, slots=2, chunk=4)
    first = engine.submit(Request(PROMPTS[0], 30, temperature=0))
    engine.step()
    second = engine.submit(Request(PROMPTS[1], 5, temperature=0))
    heard = [{event.request for event in engine.step()} for _ in range(10)]
    assert all(first in step for step in heard)
    assert [second in step for step in heard] == [False] * 9 + [True]  # 40 tokens by fours


def test_state_is_of_one_size_whatever_is_read(window):
    engine = Engine(window, BYTES, slots=3, chunk=64)
    sizes = {engine.state_bytes}
    for length in (1, 500, 2_000):
        engine.complete([Request(prompt(length), 3)] * 4)
        sizes.add(engine.state_bytes)
    assert len(sizes) == 1


def test_room_of_full_attention_follows_the_longest_text():
    engine = Engine(small_model(**MODELS["full"]), BYTES, slots=2, chunk=64)
    engine.complete([Request(prompt(200), 4)])
    assert 203 <= engine._step.room <= 203 * 5 // 4
    for _ in range(3):
        engine.complete([Request([1, 2], 6, temperature=0, stop_tokens=[])])
    assert engine._step.room == LEAST_ROOM


def test_kept_state_of_full_attention_has_no_room_beyond_its_tokens():
    model = small_model(**MODELS["full"]).double()
    cache = PrefixCache(2**30, block=64)
    engine = Engine(model, BYTES, slots=2, chunk=64, cache=cache)
    long, short = Request(prompt(200), 100, temperature=0), Request([1, 2], 6, temperature=0)
    engine.submit(long)
    (text,) = engine.complete([short])
    read = [1, 2, *text.tokens[:-1]]
    tokens, state = cache.find(read)
    assert list(tokens) == read
    assert state[1].keys.shape[1] == len(read) < engine._step.room
    longer = Request([*read, 7, 8], 4, temperature=0)
    (more,) = engine.complete([longer])
    assert more.tokens == alone(model, longer)


def texts_of(model, stops, n=40, temperature=0.0):
    engine = Engine(model, BYTES, slots=2, chunk=8)
    numbers = [engine.submit(Request(p, n, temperature, seed=1, stop_strings=stops)) for p in PROMPTS[:2]]
    pieces = {number: [] for number in numbers}
    finish = {}
    while not engine.idle:
        for event in engine.step():
            pieces[event.request].append(event.text)
            finish[event.request] = event.finish
    return [pieces[number] for number in numbers], [finish[number] for number in numbers]


def test_stop_strings_end_a_text_across_the_borders_of_tokens():
    class Says(torch.nn.Module):
        """Says one text, a byte a step, whatever the prompt."""

        def __init__(self, text):
            super().__init__()
            self.inner = small_model()
            self.config, self.initial_state = self.inner.config, self.inner.initial_state
            self.bytes = [*text.encode(), 256]
            self.at = -1

        def forward(self, tokens, state=None):
            self.at += 1
            return self.inner(tokens, state)

        def step(self, tokens, state):
            self.at += 1
            return self.logits(self.inner.step(tokens, state))

        def logits(self, hidden):
            said = torch.zeros(*hidden.shape[:-1], 257)
            said[..., self.bytes[min(self.at, len(self.bytes) - 1)]] = 1
            return said

    def say(text, **settings):
        model = Says(text)
        engine = Engine(model, BYTES, slots=1)
        engine.submit(Request([1], **{"max_new_tokens": 40, "temperature": 0} | settings))
        events = []
        while not engine.idle:
            events += engine.step()
        return [event.text for event in events], events[-1].finish

    pieces, finish = say("naïve – STOP and on", stop_strings=["– ST", "xyz"])
    assert ("".join(pieces), finish) == ("naïve ", "stop")
    assert pieces == ["n", "a", "", "ï", "v", "e", " ", "", "", "", "", "", ""]  # held back until it is certain
    assert say("naïve") == (["n", "a", "", "ï", "v", "e", ""], "stop")  # end of text
    pieces, finish = say("end–", max_new_tokens=5)
    assert ("".join(pieces), finish) == ("end�", "length")  # a cut character is marked
    pieces, finish = say("endST", stop_strings=["STOP"])
    assert ("".join(pieces), finish) == ("endST", "stop")  # what was held back comes at the end


def test_every_piece_is_valid_utf8():
    pieces, _ = texts_of(small_model(), [], temperature=1.0)
    for row in pieces:
        for piece in row:
            piece.encode("utf-8")


@torch.no_grad()
def test_log_probabilities_are_the_models_own(window):
    request = Request(PROMPTS[1], 6, temperature=0.7, seed=3, logprobs=3)
    (done, plain) = Engine(window, BYTES, slots=2, chunk=8).complete([request, Request([1], 6)])
    hidden, _ = window(torch.tensor([[*PROMPTS[1], *done.tokens]]))
    scores = window.logits(hidden)[0, len(PROMPTS[1]) - 1 :].log_softmax(-1)
    assert len(done.scores) == len(done.tokens) > 0
    assert not plain.scores
    for score, row, token in zip(done.scores, scores, done.tokens):
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-9)
        best = row.topk(3)
        assert list(score.top) == best.indices.tolist()
        assert list(score.top.values()) == pytest.approx(best.values.tolist(), abs=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 8, 23])
def test_log_probabilities_of_the_prompt_come_first_whatever_is_cached(window, length):
    text = prompt(length, seed=3)
    engine = Engine(window, BYTES, slots=2, chunk=8, cache=PrefixCache(2**30, block=8))
    engine.complete([Request(text, 2)])  # so that the cache has it
    number = engine.submit(Request(text, 3, temperature=0, prompt_logprobs=2))
    events = []
    while not engine.idle:
        events += [event for event in engine.step() if event.request == number]
    hidden, _ = window(torch.tensor([text]))
    expected = window.logits(hidden)[0, :-1].log_softmax(-1)
    assert [len(event.prompt_scores) for event in events] == [length - 1] + [0] * (len(events) - 1)
    for score, row, token in zip(events[0].prompt_scores, expected, text[1:]):
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-9)
        assert list(score.top) == row.topk(2).indices.tolist()


def test_token_that_ends_a_text_has_its_log_probability(window):
    (token,) = Engine(window, BYTES, slots=1).complete([Request([1], 1, temperature=0)])[0].tokens
    engine = Engine(window, BYTES, slots=1)
    engine.submit(Request([1], 5, temperature=0, stop_tokens=[token], logprobs=1))
    (event,) = engine.step()
    assert (event.token, event.finish) == (None, "stop")
    assert event.score.top == {token: event.score.logprob}


@pytest.mark.parametrize("slots", [1, 2])
def test_prefix_cache_spares_reading_and_changes_no_text(window, slots):
    cache = PrefixCache(2**30, block=8)
    requests = [Request(PROMPTS[1] + tail, 6, temperature=0) for tail in ([], [1, 2], [3] * 9)]
    engine = Engine(window, BYTES, slots=slots, chunk=8, cache=cache)
    expected = [alone(window, request) for request in requests]
    assert [c.tokens for c in engine.complete(requests)] == expected
    read = []
    handle = window.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape)))
    (again,) = engine.complete([requests[0]])
    answered = [*PROMPTS[1], *again.tokens]
    (more,) = engine.complete([Request([*answered, 7, 8], 4, temperature=0)])
    handle.remove()
    # Of the first prompt its last chunk; of the longer one the answer's last token, never read, and what follows it.
    assert [T for _, T in read if T > 1] == [8, 3]
    assert again.tokens == expected[0]
    assert more.tokens == alone(window, Request([*answered, 7, 8], 4, temperature=0))


def test_requests_of_equal_seed_agree_and_fresh_ones_differ(window):
    engine = Engine(window, BYTES, slots=3, chunk=8)
    a, b, c, d = (x.tokens for x in engine.complete([Request([1], 20, seed=s) for s in (4, 4, None, None)]))
    assert a == b
    assert c != d


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, r"prompt is \[\]; expected at least one token"),
        ({"prompt": [257]}, r"prompt: token is 257; expected an id in \[0, 257\)"),
        ({"stop_tokens": [-1]}, "stop_tokens: token is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected an integer >= 1"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number >= 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, r"top_p is 0; expected a number in \(0, 1\]"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"logprobs": 300}, "logprobs is 300; expected 0 to 257, or None"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; expected 0 to 257, or None"),
        ({"stop_strings": [""]}, "stop strings is"),
    ],
)
def test_bad_requests_are_refused_and_the_engine_goes_on(window, change, message):
    engine = Engine(window, BYTES, slots=1)
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(**{"prompt": [1]} | change))
    assert engine.idle
    assert len(engine.complete([Request([1], 2, temperature=0)])[0].tokens) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots is 0; expected an integer >= 1"),
        ({"chunk": 0}, "chunk is 0; expected an integer >= 1"),
        ({"cache": PrefixCache(1, block=8)}, "chunk is 512 and the cache's block 8; expected the same"),
    ],
)
def test_bad_engines_are_named(window, settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(window, BYTES, **settings)
