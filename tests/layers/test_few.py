"""Few texts are decoded by kernels that take norms and sums along, with the results of a step in float64."""

import copy

import pytest
import torch
from small import MODELS, prompt, small_model

from gdn2.decoding import DecodeStep
from gdn2.ops import fused
from gdn2.ops.kernels import mix, project

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# For two blocks and the head: input and output products, and between them the mixer or nothing that is counted here.
TAKEN = {
    "gdn2": ({}, 11),
    "window": (MODELS["window"], 10),
    "full": (MODELS["full"], 10),
    "negative, tied": ({"negative_eigenvalues": True, "tie_embeddings": True}, 11),
    "odd": ({"num_heads": 3, "key_dim": 5, "value_dim": 6, "mlp_width": 21, "d_model": 20, "conv_width": 3}, 11),
}
OTHERS = {
    "mamba2": MODELS["mamba2"],
    "grouped": {"num_value_heads": 4},
    "ablated": {"channel_write": False},
}


@pytest.fixture
def calls(monkeypatch):
    """The kernels are used on this device, and what is called of them is noted."""
    monkeypatch.setattr(fused, "DEVICES", (DEVICE,))
    if DEVICE == "cpu":
        monkeypatch.setattr(project, "WARPS", 128)  # fewer programs for the interpreter
    noted = []

    def noting(name, call):
        def note(*args, **options):
            noted.append(name)
            return call(*args, **options)

        return note

    for module, name in ((project, "project"), (mix, "mix")):
        monkeypatch.setattr(module, name, noting(name, getattr(module, name)))
    return noted


def hold(changes, rows=2, memory=None, bound=1e-4):
    """A packed model's steps in float32 beside those in float64, over two blocks and a few tokens of feedback."""
    model = small_model(**changes).to(DEVICE)
    plain = copy.deepcopy(model).double()
    model.pack()
    step, wide = DecodeStep(model, rows, graph=False, memory_dtype=memory), DecodeStep(plain, rows, graph=False)
    reads = torch.tensor([prompt(3, seed) for seed in range(rows)]).T.tolist()
    for tokens in reads:
        torch.testing.assert_close(step(tokens).double(), wide(tokens), atol=bound, rtol=bound)
    for own, other in zip(step.state, wide.state):
        for a, b in zip(own, other):
            torch.testing.assert_close(a.double(), b.double(), atol=bound, rtol=bound)
    return len(reads)


@pytest.mark.parametrize("name", TAKEN)
def test_few_rows_say_what_float64_says(calls, name):
    changes, count = TAKEN[name]
    steps = hold(changes)
    assert len(calls) == steps * count


@pytest.mark.parametrize("name", OTHERS)
def test_other_mixers_step_as_they_did(calls, name):
    hold(OTHERS[name])
    assert not calls


def test_many_rows_step_as_they_did(calls):
    hold({}, rows=5)
    assert not calls


def test_memories_in_16_bits(calls):
    hold({}, memory=torch.bfloat16, bound=3e-2)  # rounded to 8 bits after each token
    assert "mix" in calls


def test_weights_in_8_bits_keep_their_kernel(calls):
    model = small_model().to(DEVICE).quantize("int8")
    model.pack()
    DecodeStep(model, 1, graph=False)([3])
    assert not calls


def test_autocast_keeps_the_library(calls):
    model = small_model().to(DEVICE)
    model.pack()
    with torch.autocast(DEVICE, torch.bfloat16):
        DecodeStep(model, 1, graph=False)([3])
    assert not calls
    DecodeStep(model, 1, graph=False)([3])
    assert len(calls) == 11


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_gpu_graph_says_what_steps_say(monkeypatch, rows):
    """Kernels that begin early, from a graph, beside kernels that do not, at the sizes of 1.3 billion parameters."""
    from gdn2.ops.kernels import early

    sizes = {"d_model": 2_304, "mlp_width": 6_208, "num_heads": 16, "key_dim": 128, "value_dim": 128, "num_layers": 2}
    model = small_model(**sizes).to(DEVICE).bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr(early, "NEXT", 0)
        model.pack()
        plain = DecodeStep(model, rows, graph=False)
        texts = torch.tensor([prompt(40, seed) for seed in range(rows)]).T.tolist()
        expected = [plain(tokens).clone() for tokens in texts]
    step = DecodeStep(model, rows, graph=True)
    for tokens, logits in zip(texts, expected):
        assert torch.equal(step(tokens), logits)
    for own, other in zip(step.state, plain.state):
        assert all(torch.equal(a, b) for a, b in zip(own, other))
