"""States are found by the longest stored prefix of their tokens, within a budget of bytes."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2.inference import PrefixCache


class Block(NamedTuple):
    memory: torch.Tensor


def state(number=0, floats=4):
    return (Block(torch.full((1, floats), float(number))),)


def number(found):
    return None if found is None else (list(found[0]), int(found[1][0].memory[0, 0]))


SHORT = st.lists(st.integers(0, 1), max_size=9)


@settings(deadline=None)
@given(st.lists(SHORT, max_size=12), SHORT, st.integers(1, 5))
def test_longest_stored_prefix_is_found(texts, asked, block):
    cache, plain = PrefixCache(2**20, block), {}
    for i, text in enumerate(texts):
        cache.store(text, state(i))
        if text:
            plain[tuple(text)] = i
    prefixes = [text for text in plain if text == tuple(asked[: len(text)])]
    longest = max(prefixes, key=len, default=None)
    assert number(cache.find(asked)) == (None if longest is None else (list(longest), plain[longest]))
    assert len(cache) == len(plain)
    assert cache.bytes == 16 * len(plain)


def test_least_recently_used_state_makes_room():
    cache = PrefixCache(48, block=2)
    for i in range(3):
        cache.store([i], state(i))
    cache.find([0])
    cache.store([3], state(3))
    assert [number(cache.find([i])) is not None for i in range(4)] == [True, False, True, True]
    assert cache.bytes == 48


def test_bytes_are_within_the_capacity_and_return_to_none():
    cache = PrefixCache(100, block=2)
    for i in range(50):
        cache.store([i, i, i], state(i, floats=1 + i % 9))
        assert cache.bytes <= 100
    cache.store([1], state(floats=26))  # larger than the cache: the others stay
    assert len(cache) > 0
    cache.clear()
    assert (len(cache), cache.bytes, cache.find([49, 49, 49])) == (0, 0, None)
    assert not cache._rests


def test_state_before_the_first_token_needs_no_place():
    cache = PrefixCache(100)
    cache.store((), None)  # the snapshot of a session that has read nothing
    assert (len(cache), cache.find([1])) == (0, None)


def test_row_of_a_batch_does_not_keep_the_batch_alive():
    batch = torch.zeros(1000, 4)
    cache = PrefixCache(2**20)
    cache.store([1], (Block(batch[:1]),))
    found = cache.find([1])
    assert found is not None
    assert found[1][0].memory.untyped_storage().nbytes() == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1,), "capacity is -1; expected an integer >= 0"), ((1, 0), "block is 0; expected an integer >= 1")],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrefixCache(*arguments)
