"""A hybrid model with everything fused is the model: loss and gradients, and blocks that compile once."""

import pytest
import torch
from operands import assert_close

from gdn2 import LanguageModel, ModelConfig
from gdn2.ops import fused
from gdn2.training.compiling import compile_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = ModelConfig(
    vocab_size=37, d_model=16, num_layers=2, mlp_width=20, cell=("mixer", "attention"), num_heads=1, key_dim=4,
    value_dim=4, attention_heads=2, window=4,
)  # fmt: skip

# torch's own, where the first matrix product of a process happens to be one of a backward; and torch.compile's look.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def models():
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    exact = LanguageModel(CONFIG).double()
    exact.load_state_dict(model.state_dict())
    return model.to(DEVICE), exact


def step(model, lengths, autocast=False):
    """Loss and gradients on random words, every fifth of which has no target."""
    device, packed = next(model.parameters()).device, lengths is not None
    words = torch.randint(37, (1, 8), generator=torch.Generator().manual_seed(0))
    targets = words.roll(-1, 1)
    targets[:, ::5] = -100
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device) if packed else None
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = model.loss(words.to(device), targets.to(device), cu_seqlens)
    loss.backward()
    gradients = {f"d {n}": p.grad for n, p in model.named_parameters()}
    return {n: t.detach().double().cpu() for n, t in ({"loss": loss} | gradients).items()}


@pytest.mark.parametrize("lengths", [None, [3, 0, 5]])
def test_loss_and_gradients_match_float64(lengths):
    model, exact = models()
    # float32: a few hundred roundings of 2^-24, in gradients that are small differences.
    assert_close(step(model, lengths), step(exact, lengths), 5e-5)


def test_under_autocast_too():
    model, exact = models()
    found, expected = step(model, None, autocast=True), step(exact, None)
    assert abs(found["loss"] - expected["loss"]) < 2e-3
    whole, error = (torch.cat([g.flatten() for n, g in some.items() if n != "loss"]) for some in (
        expected, {n: found[n] - expected[n] for n in expected},
    ))  # fmt: skip
    assert error.norm() < 0.05 * whole.norm()  # some twenty roundings to 8 bits; the interpreter truncates


def test_compiled_blocks_match_eager_and_are_not_compiled_for_other_texts():
    from torch._dynamo.testing import CompileCounterWithBackend

    model, _ = models()
    texts = [None, [3, 5], [1, 2, 5], [8], [2, 2, 2, 2]]
    eager = step(model, texts[-1])
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compile_blocks(model, backend=counter, fullgraph=True)
    for lengths in texts:
        found = step(model, lengths)
        counts.append(counter.frame_count)
    assert counts == [2, 4, 4, 4, 4]  # two kinds of blocks: without offsets, and with any number of texts
    assert_close(found, eager, 1e-5)  # the same kernels in the same order; only the graph around them differs


@torch.no_grad()
def test_compiled_blocks_run_without_gradients_too():
    model, _ = models()
    words = torch.arange(8, device=DEVICE)[None]
    eager = model(words, output_state=False)[0]
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(words, output_state=False)[0], eager, rtol=1e-5, atol=1e-6)
