"""The memory view is of what the model does: erased values add up, half-lives and gates are the layer's own."""

import math

import pytest
import torch
from saved_run import save_run
from small import MODELS, prompt, small_model

from gdn2.inference import trace_blocks
from gdn2.report.memory import taken, view_memory


@pytest.mark.parametrize("name", ["gdn2", "window", "kda"])
def test_what_was_taken_from_each_token_adds_up_to_what_was_erased(name):
    """Signed by the values' directions, the parts are the erased value of (9) itself."""
    model = small_model(**MODELS[name]).double()
    trace = trace_blocks(model, prompt(30), model.initial_state(1))[0][0]
    for head in (0, 1):
        put = (trace.write - trace.erase)[:, head]
        parts = taken(trace, head) @ (put / put.norm(dim=-1, keepdim=True))
        torch.testing.assert_close(parts, trace.erase[:, head], atol=1e-10, rtol=1e-10)
        assert trace.erase[5:, head].abs().max() > 1e-3


def test_view_is_of_the_newest_checkpoint_and_counts_all_there_is(tmp_path):
    model = small_model()
    save_run(tmp_path, model)
    view = view_memory(tmp_path, "naïve €")
    assert "".join(view.tokens) == "naïve €"
    assert len(view.tokens) == 10
    assert view.tokens[2] == ""  # the first byte of a character alone says nothing
    traces, _ = trace_blocks(model, list("naïve €".encode()), model.initial_state(1))
    for block, trace in zip(view.blocks, traces):
        torch.testing.assert_close(torch.tensor(block.written), trace.written.norm(dim=-1))
        torch.testing.assert_close(torch.tensor(block.erased), trace.erased.norm(dim=-1))
        assert [len(head) for head in block.half_lives] == [8, 8]
        mean = -trace.alpha.log().mean(0)
        lives = (math.log(2) / mean).sort(-1).values
        torch.testing.assert_close(torch.tensor(block.half_lives), lives, rtol=1e-4, atol=0)
        for histogram in (block.erase, block.write, block.keep):
            assert sum(histogram.counts) == 10 * 2 * 8
        assert block.erase.mean == pytest.approx(float(trace.erase_gate.mean()), rel=1e-5)
    total = {
        (block.block, head): float(trace.erased[:, head].square().sum())
        for block, trace in zip(view.blocks, traces)
        for head in range(trace.erased.shape[1])
    }
    assert len(total) == 4
    assert (view.block, view.head) == max(total, key=total.__getitem__)


def test_doubled_gates_and_memories_without_decay(tmp_path):
    save_run(tmp_path, small_model(mixer="deltanet", negative_eigenvalues=True))
    view = view_memory(tmp_path, "x")
    assert view.largest == (2.0, 2.0)
    assert view.taken == [[0.0]]
    assert all(math.isinf(life) for block in view.blocks for head in block.half_lives for life in head)


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({"mixer": "mamba2"}, "x", "a model of 'mamba2'; expected a delta rule"),
        ({}, "", "the prompt has 0 tokens; expected 1 to 256"),
        ({}, "x" * 257, "the prompt has 257 tokens"),
    ],
)
def test_what_cannot_be_viewed_is_said(tmp_path, changes, text, message):
    save_run(tmp_path, small_model(**changes))
    with pytest.raises(ValueError, match=message):
        view_memory(tmp_path, text)
