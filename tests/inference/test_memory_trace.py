"""The trace is of what the model does: its updates rebuild the very memory that the model ends with."""

import pytest
import torch
from small import MODELS, prompt, small_model

from gdn2.inference import MemoryTrace, traced_blocks

VARIANTS = {
    "gdn2": MODELS["gdn2"],
    "window": MODELS["window"],
    "kda": MODELS["kda"],
    "deltanet": {"mixer": "deltanet"},
    "ablated": {"channel_erase": False, "channel_write": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_updates_rebuild_the_models_memory(name):
    model = small_model(**VARIANTS[name]).double()
    tokens = prompt(30)
    with torch.inference_mode():
        _, state = model(torch.tensor([tokens]), model.initial_state(1))
    for block in traced_blocks(model):
        trace = MemoryTrace(model, block, head=1)
        told = [*trace.read(tokens[:20]), *trace.read(tokens[20:21]), *trace.read(tokens[21:])]
        S = torch.zeros_like(state[block].memory[0, 1])
        for token in told:
            alpha, key, erase, write = (part.double() for part in token.head)
            kept = alpha[:, None] * S
            row = traced_blocks(model).index(block)
            # float32 numbers are told of a float64 model: some 1e-7 each, which thirty updates add up.
            assert float(token.faded[row, 1]) == pytest.approx(float((S - kept).norm()), abs=1e-5)
            assert float(token.erased[row, 1]) == pytest.approx(float(torch.outer(key, erase).norm()), abs=1e-5)
            assert float(token.written[row, 1]) == pytest.approx(float(torch.outer(key, write).norm()), abs=1e-5)
            S = kept + torch.outer(key, write - erase)
        assert len(told) == len(tokens)
        torch.testing.assert_close(S, state[block].memory[0, 1], atol=1e-5, rtol=1e-5)
        assert token.faded.shape == (len(traced_blocks(model)), 2)


def test_tracing_changes_nothing_and_leaves_no_hook():
    model = small_model().double()
    with torch.inference_mode():
        _, expected = model(torch.tensor([prompt(9)]), model.initial_state(1))
    trace = MemoryTrace(model, 0)
    trace.read(prompt(9))
    for mine, theirs in zip(trace.state, expected):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "block", "head", "message"),
    [
        ({"mixer": "mamba2"}, 0, 0, "mixer is 'mamba2'; expected a delta rule"),
        (MODELS["window"], 1, 0, "block is 1; expected one with a memory, of 0"),
        ({}, 0, 2, "head is 2; expected 0 to 1"),
    ],
)
def test_what_has_no_trace_is_named(changes, block, head, message):
    with pytest.raises(ValueError, match=message):
        MemoryTrace(small_model(**changes), block, head)
