"""A session's state is a value: kept, forked, restored and rolled back without a bit changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import MODELS, prompt, small_model

from gdn2.inference import PrefixCache, Session, read_prompt

TEXT = prompt(60)


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return small_model(**MODELS[request.param])


def same(a, b):
    """Two states, bit for bit."""
    return all(torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def bits(state):
    return [[tensor.clone() for tensor in block] for block in state]


def read(model, *pieces, **settings):
    session = Session(model, **settings)
    for piece in pieces:
        logits = session.read(piece, last=len(piece))
    return session, logits


def test_chunk_and_steps_agree_to_rounding(model):
    model = small_model(**model.config.__dict__).double()
    session, whole = read(model, TEXT)
    steps = Session(model)
    logits = torch.cat([steps.read([token]) for token in TEXT])
    torch.testing.assert_close(logits, whole, atol=1e-9, rtol=1e-9)
    for left, right in zip(session.snapshot().state, steps.snapshot().state):
        slots = min(len(left[0][0]), len(right[0][0]))  # full attention keeps room for what it has read at most
        for a, b in zip(left, right):
            torch.testing.assert_close(*((a[:, :slots], b[:, :slots]) if a.dim() > 1 else (a, b)), atol=1e-9, rtol=1e-9)


def test_snapshot_keeps_its_bits_while_the_session_goes_on(model):
    session, _ = read(model, TEXT[:30])
    kept = session.snapshot()
    before = bits(kept.state)
    for token in TEXT[30:]:
        session.read([token])
    assert same(kept.state, before)
    assert kept.tokens == tuple(TEXT[:30])


def test_restored_session_goes_on_bit_for_bit(model):
    session, _ = read(model, TEXT[:30])
    kept = session.snapshot()
    first = session.read(TEXT[30:], last=30)
    after = bits(session.snapshot().state)
    for other in (session, Session(model)):
        other.restore(kept)
        assert torch.equal(other.read(TEXT[30:], last=30), first)
        assert same(other.snapshot().state, after)


def test_forks_go_on_alone_bit_for_bit(model):
    session, _ = read(model, TEXT[:30])
    twin = session.fork()
    twin.read(prompt(20, seed=1))
    fresh, expected = read(model, TEXT[:30], TEXT[30:])
    assert torch.equal(session.read(TEXT[30:], last=30), expected)
    assert same(session.snapshot().state, fresh.snapshot().state)
    assert twin.tokens == (*TEXT[:30], *prompt(20, seed=1))
    assert torch.equal(twin.read([7]), read(model, TEXT[:30], prompt(20, seed=1), [7])[1])


def test_rollback_to_a_kept_state_is_bit_for_bit(model):
    session, _ = read(model, TEXT[:30], TEXT[30:])
    session.rollback(30)
    assert session.tokens == tuple(TEXT[:30])
    assert session.unread == 0
    fresh, expected = read(model, TEXT[:30], prompt(9, seed=2))
    assert torch.equal(session.read(prompt(9, seed=2), last=9), expected)
    assert same(session.snapshot().state, fresh.snapshot().state)


@pytest.mark.parametrize("length", [0, 1, 29, 30, 31, 59, 60])
def test_rollback_anywhere_is_a_fresh_reading_from_the_kept_state(model, length):
    session, _ = read(model, TEXT[:30], TEXT[30:])
    session.rollback(length)
    assert len(session) == length
    start = 0 if length < 30 else 30
    rest = prompt(5, seed=3)
    pieces = [TEXT[:30]] if start else []
    # What lies between the kept state and the length is read together with what comes next; at 60 nothing does.
    pieces += [TEXT[30:], rest] if length == 60 else [TEXT[start:length] + rest]
    fresh, expected = read(model, *pieces)
    assert torch.equal(session.read(rest, last=5), expected[-5:])
    assert same(session.snapshot().state, fresh.snapshot().state)
    assert session.tokens == (*TEXT[:length], *rest)


def test_settling_reads_what_a_rollback_left(model):
    session, _ = read(model, TEXT[:30], TEXT[30:])
    session.rollback(45)
    assert session.unread == 15
    session.settle()
    assert session.unread == 0
    assert same(session.snapshot().state, read(model, TEXT[:30], TEXT[30:45])[0].snapshot().state)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 7), st.integers(-30, 0)), max_size=12))
def test_any_reads_and_rollbacks_end_where_plain_reading_does(steps):
    model = small_model(**MODELS["window"]).double()
    session, text, source = Session(model, chunk=5, keep=2), [], iter(prompt(200, seed=4))
    for step in steps:
        if step > 0:
            new = [next(source) for _ in range(step)]
            session.read(new)
            text += new
        else:
            del text[max(0, len(text) + step) :]
            session.rollback(len(text))
    assert session.tokens == tuple(text)
    torch.testing.assert_close(session.read([1]), read(model, [*text, 1])[1][-1:], atol=1e-9, rtol=1e-9)


def test_state_of_one_size_whatever_was_read():
    model = small_model(**MODELS["window"])
    session, sizes = Session(model), set()
    for _ in range(5):
        session.read(TEXT)
        sizes.add(sum(t.untyped_storage().nbytes() for block in session.snapshot().state for t in block))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.read([]), "last is 1 of 0 tokens; expected 1 to all of at least one"),
        (lambda s: s.read([1, 2], last=3), "last is 3 of 2 tokens"),
        (lambda s: s.read([1, 257]), r"token is 257; expected an id in \[0, 257\)"),
        (lambda s: s.rollback(4), "length is 4; expected 0 to the 3 tokens so far"),
        (lambda s: s.rollback(-1), "length is -1"),
        (lambda s: Session(s.model, chunk=0), "chunk is 0; expected an integer >= 1"),
        (lambda s: Session(s.model, keep=-1), "keep is -1; expected an integer >= 0"),
    ],
)
def test_bad_calls_are_named_and_change_nothing(call, message):
    session, _ = read(small_model(), [1, 2, 3])
    with pytest.raises(ValueError, match=message):
        call(session)
    assert session.tokens == (1, 2, 3)
    assert torch.equal(session.read([4]), read(small_model(), [1, 2, 3], [4])[1])


def test_cached_prefix_gives_the_bits_of_a_fresh_reading(model):
    cache = PrefixCache(2**30, block=8)
    _, logits = read_prompt(model, TEXT[:45], cache, chunk=8)
    assert len(cache) == 6  # five whole chunks and the end
    for tokens in (TEXT[:45], TEXT[:40] + prompt(20, seed=5), TEXT[:20], [*TEXT[:8], 1]):
        cached, from_cache = read_prompt(model, tokens, cache, chunk=8)
        fresh, plain = read_prompt(model, tokens, PrefixCache(2**30, block=8), chunk=8)
        assert torch.equal(from_cache, plain)
        assert same(cached.snapshot().state, fresh.snapshot().state)
        assert cached.tokens == tuple(tokens)
    assert torch.equal(read_prompt(model, TEXT[:45], None, chunk=8)[1], logits)


def test_cached_prefix_is_not_read_again():
    model, cache = small_model(), PrefixCache(2**30, block=8)
    counted = []
    model.register_forward_pre_hook(lambda module, args: counted.append(args[0].shape[1]))
    read_prompt(model, TEXT[:45], cache, chunk=8)
    assert counted == [8, 8, 8, 8, 8, 5]
    del counted[:]
    read_prompt(model, TEXT, cache, chunk=8)  # goes on from the end of the first, up to the next whole chunk
    assert counted == [3, 8, 4]


def test_block_and_chunk_must_agree():
    with pytest.raises(ValueError, match="chunk is 512 and the cache's block 8; expected the same"):
        read_prompt(small_model(), [1], PrefixCache(0, block=8))
