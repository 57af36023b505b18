"""The contract of everything that carries a state: chunk, step, split and packed agree in outputs, states, gradients.

In float64, where the paths differ by the order of their sums alone: over a few dozen tokens of numbers near 1 that is
some 1e-14, and 1e-10 leaves room for the sums in the gradients.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdn2 import LanguageModel, ModelConfig
from gdn2.layers import (
    AttentionState,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    LinearAttention,
    Mamba2,
    Mamba3,
    SlidingWindowAttention,
)

TOLERANCE = 1e-10
D_MODEL, VOCAB = 12, 11


def language_model(*cell: str, window: int | None = 4, mixer: str = "gdn2") -> LanguageModel:
    grouped = mixer == "gdn2" and "mixer" in cell
    return LanguageModel(
        ModelConfig(
            vocab_size=VOCAB, d_model=D_MODEL, num_layers=2, mlp_width=16, mixer=mixer, cell=cell, num_heads=1,
            num_value_heads=2 if grouped else None, key_dim=4, value_dim=3, attention_heads=2, window=window,
        )
    )  # fmt: skip


class Logits(nn.Module):
    """A language model with the face of a mixer, tokens in and logits out."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: Any = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        hidden, state = self.model(tokens, state, cu_seqlens)
        return self.model.logits(hidden), state


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mixer": lambda: GatedDeltaNet2(D_MODEL, num_heads=2, key_dim=4, value_dim=4),
    "mixer with grouped values": lambda: GatedDeltaNet2(
        D_MODEL, num_heads=2, num_value_heads=4, key_dim=3, value_dim=5
    ),
    "mixer with negative eigenvalues": lambda: GatedDeltaNet2(
        D_MODEL, num_heads=1, key_dim=4, value_dim=6, negative_eigenvalues=True
    ),
    "mixer with one tap": lambda: GatedDeltaNet2(D_MODEL, num_heads=1, key_dim=4, value_dim=4, conv_width=1),
    "mixer with ablated gates": lambda: GatedDeltaNet2(
        D_MODEL, num_heads=2, key_dim=4, value_dim=4, channel_erase=False, channel_write=False, decay_lower_bound=-5.0
    ),
    "kda": lambda: KimiDeltaAttention(D_MODEL, num_heads=2, key_dim=4, value_dim=3),
    "gdn": lambda: GatedDeltaNet(D_MODEL, num_heads=2, key_dim=4, value_dim=3),
    "deltanet": lambda: DeltaNet(D_MODEL, num_heads=2, key_dim=4, value_dim=3),
    "linear": lambda: LinearAttention(D_MODEL, num_heads=2, key_dim=4, value_dim=3),
    "mamba2": lambda: Mamba2(D_MODEL, num_heads=3, key_dim=4, value_dim=5),
    "mamba3": lambda: Mamba3(D_MODEL, num_heads=3, key_dim=4, value_dim=5),
    "mamba3, multi-input": lambda: Mamba3(D_MODEL, num_heads=2, key_dim=4, value_dim=5, mimo_rank=3),
    "attention, window 1": lambda: SlidingWindowAttention(D_MODEL, 2, window=1),
    "attention, many windows": lambda: SlidingWindowAttention(D_MODEL, 2, window=4),
    "attention, long window": lambda: SlidingWindowAttention(D_MODEL, 3, window=16),
    "attention, longer window": lambda: SlidingWindowAttention(D_MODEL, 3, window=64),
    "attention, scaled rotary": lambda: SlidingWindowAttention(D_MODEL, 2, 4, 10_000.0, "yarn", 4.0, 8),
    "full attention": lambda: SlidingWindowAttention(D_MODEL, 2, window=None),
    "recurrent model": lambda: Logits(language_model("mixer")),
    "hybrid model": lambda: Logits(language_model("mixer", "attention")),
    "mamba3 hybrid model": lambda: Logits(language_model("mixer", "attention", mixer="mamba3")),
    "full attention model": lambda: Logits(language_model("attention", window=None)),
}


@pytest.fixture(params=MODULES.values(), ids=MODULES.keys())
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    module = request.param().double()
    for p in module.parameters():  # the paper's initialisation is so small that errors would hide
        if p.ndim > 1:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return module


def inputs(module: nn.Module, batch: int, tokens: int) -> Tensor:
    if isinstance(module, Logits):
        return torch.randint(VOCAB, (batch, tokens))
    return torch.randn(batch, tokens, D_MODEL, dtype=torch.float64, requires_grad=True)


def layer_states(state: Any) -> list[Any]:
    """The states of the layers, one for a mixer and one per block for a model."""
    return [state] if hasattr(state, "_fields") else list(state)


def tensors(state: Any) -> list[Tensor]:
    return [t for layer in layer_states(state) for t in layer]


def rows(state: Any, n: int) -> Any:
    cut = [type(s)(*(t[n : n + 1] for t in s)) for s in layer_states(state)]
    return cut[0] if hasattr(state, "_fields") else tuple(cut)


def stack(states: list[Any]) -> list[Tensor]:
    """The rows of several states; grown caches are filled up to the longest."""
    parts = [tensors(s) for s in states]
    out = []
    for column in zip(*parts):
        longest = max(t.shape[1] if t.ndim > 1 else 0 for t in column)
        out.append(torch.cat([_fill(t, longest) for t in column]))
    return out


def _fill(t: Tensor, slots: int) -> Tensor:
    if t.ndim == 1 or t.shape[1] == slots:
        return t
    return torch.cat([t, t.new_zeros(t.shape[0], slots - t.shape[1], *t.shape[2:])], dim=1)


def started(module: nn.Module, batch: int, tokens: int = 6) -> Any:
    """A state some tokens into a sequence, as a leaf of the graph."""
    with torch.no_grad():
        _, state = module(inputs(module, batch, tokens))
    for t in tensors(state):
        if t.is_floating_point():
            t.requires_grad_()
    return state


def weighted(ts: list[Tensor]) -> Tensor:
    """A scalar in which every number counts differently, so that its gradient tells them apart."""
    total = torch.zeros((), dtype=torch.float64)
    for t in ts:
        if t.is_floating_point():
            total = total + (t * torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view_as(t)).sum()
    return total


def agree(module: nn.Module, x: Tensor, state: Any, one: Callable, other: Callable) -> None:
    """Both ways give (y, list of state tensors): they and the gradients of parameters, input and state are the same."""
    leaves = [*module.parameters(), *(tensors(state) if state is not None else []), x]
    leaves = [t for t in leaves if t.is_floating_point()]
    results = []
    for way in (one, other):
        y, after = way()
        gradients = torch.autograd.grad(weighted([y, *after]), leaves, allow_unused=True, materialize_grads=True)
        results.append([y, *after, *gradients])
    assert any(bool(g.any()) for g in results[0][-len(leaves) :])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("cuts", [[1] * 23, [7, 1, 15], [0, 20, 3], [2, 0, 21]], ids=str)
@pytest.mark.parametrize("fresh", [True, False], ids=["from nothing", "from a state"])
def test_split_sequence_matches_whole(module: nn.Module, cuts: list[int], fresh: bool) -> None:
    state = None if fresh else started(module, batch=2)
    x = inputs(module, 2, sum(cuts))

    def whole() -> tuple[Tensor, list[Tensor]]:
        y, after = module(x, state)
        return y, tensors(after)

    def split() -> tuple[Tensor, list[Tensor]]:
        after, outputs = state, []
        for part in x.split(cuts, dim=1):
            y, after = module(part, after)
            outputs.append(y)
        return torch.cat(outputs, dim=1), tensors(after)

    agree(module, x, state, whole, split)


@pytest.mark.parametrize("lengths", [[0, 1, 9, 0, 3, 20, 1], [5, 2, 0], [30]], ids=str)
@pytest.mark.parametrize("fresh", [True, False], ids=["from nothing", "from a state"])
def test_packed_matches_separate(module: nn.Module, lengths: list[int], fresh: bool) -> None:
    N = len(lengths)
    state = None if fresh else started(module, batch=N)
    x = inputs(module, 1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def packed() -> tuple[Tensor, list[Tensor]]:
        y, after = module(x, state, cu_seqlens)
        return y, tensors(after)

    def separate() -> tuple[Tensor, list[Tensor]]:
        runs = [module(part, None if fresh else rows(state, n)) for n, part in enumerate(x.split(lengths, dim=1))]
        return torch.cat([y for y, _ in runs], dim=1), stack([after for _, after in runs])

    agree(module, x, state, packed, separate)


def test_packed_states_of_unequal_length_step_as_a_batch(module: nn.Module) -> None:
    """Prefill prompts of several lengths in one packed pass, then decode them side by side."""
    lengths = [9, 0, 2]
    x, token = inputs(module, 1, sum(lengths)), inputs(module, len(lengths), 1)
    _, state = module(x, None, torch.tensor([0, *lengths]).cumsum(0))
    y, _ = module(token, state)
    for n, part in enumerate(x.split(lengths, dim=1)):
        whole, _ = module(torch.cat([part, token[n : n + 1]], dim=1))
        torch.testing.assert_close(y[n, -1], whole[0, -1], rtol=TOLERANCE, atol=TOLERANCE)


def test_initial_state_is_no_state(module: nn.Module) -> None:
    x = inputs(module, 2, 10)
    inner = module.model if isinstance(module, Logits) else module
    y, after = module(x, inner.initial_state(2))
    expected, expected_after = module(x)
    torch.testing.assert_close(y, expected, rtol=TOLERANCE, atol=TOLERANCE)
    for a, b in zip(tensors(after), tensors(expected_after), strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        assert a.dtype == b.dtype


def test_later_tokens_do_not_change_earlier_outputs(module: nn.Module) -> None:
    """What a batch is padded with on the right is of no consequence."""
    x = inputs(module, 2, 20)
    y, _ = module(x)
    for real in (1, 7, 13):
        padded = torch.cat([x[:, :real], inputs(module, 2, 20 - real)], dim=1)
        torch.testing.assert_close(module(padded)[0][:, :real], y[:, :real], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_state_is_never_changed_in_place(module: nn.Module) -> None:
    state = started(module, batch=1)
    before = [t.detach().clone() for t in tensors(state)]
    module(inputs(module, 1, 9), state)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))


def test_full_attention_grows_and_windows_do_not() -> None:
    for window, slots in ((None, 9), (4, 4)):
        attention = SlidingWindowAttention(D_MODEL, 2, window=window)
        _, state = attention(torch.randn(2, 6, D_MODEL))
        _, state = attention(torch.randn(2, 3, D_MODEL), state)
        assert isinstance(state, AttentionState)
        assert state.keys.shape == (2, slots, 2, D_MODEL // 2)
        assert state.position.tolist() == [9, 9]
