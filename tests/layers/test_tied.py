"""KDA, Gated DeltaNet and DeltaNet, each against its own recurrence, token by token, written from its own paper."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.layers.delta import DeltaMixer
from gdn2.layers.tied import DeltaNet, GatedDeltaNet, KimiDeltaAttention

H, K, V, WIDTH, D_MODEL = 2, 3, 5, 4, 7


def heads(x: Tensor, weight: Tensor) -> Tensor:
    """W x, convolved over the last tokens, through SiLU, by heads: x [B, T, D]."""
    taps = weight.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = sum(padded[:, j : j + x.shape[1]] * weight[:, j] for j in range(taps))
    return (y * torch.sigmoid(y)).view(*x.shape[:2], H, -1)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def step_size(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def kda_decay(layer: DeltaMixer, x: Tensor) -> Tensor:
    decay = layer.gates.decay
    f = x @ decay.projection[0].weight.T @ decay.projection[1].weight.T + decay.delta
    return torch.exp(-decay.rate.exp()[:, None] * step_size(f).view(*x.shape[:2], H, K))


def bounded_decay(layer: DeltaMixer, x: Tensor) -> Tensor:
    decay = layer.gates.decay
    f = (x @ decay.projection[0].weight.T @ decay.projection[1].weight.T + decay.delta).view(*x.shape[:2], H, K)
    return torch.exp(-3 / (1 + torch.exp(-decay.rate.exp()[:, None] * f)))


def gdn_decay(layer: DeltaMixer, x: Tensor) -> Tensor:
    decay = layer.gates.decay
    return torch.exp(-decay.rate.exp() * step_size(x @ decay.projection.weight.T + decay.delta))[..., None]


def no_decay(layer: DeltaMixer, x: Tensor) -> Tensor:
    return x.new_ones(*x.shape[:2], H, 1)


def kda_out(layer: DeltaMixer, o: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(x @ layer.output_gate[0].weight.T @ layer.output_gate[1].weight.T + layer.output_gate[1].bias)
    return rms(o, layer.norm.weight) * gate.view_as(o)


def gdn_out(layer: DeltaMixer, o: Tensor, x: Tensor) -> Tensor:
    gate = x @ layer.output_gate.weight.T
    return rms(o, layer.norm.weight) * (gate * torch.sigmoid(gate)).view_as(o)


def plain_out(layer: DeltaMixer, o: Tensor, x: Tensor) -> Tensor:
    return rms(o, layer.norm.weight)


CASES: dict[str, tuple[Callable[[], DeltaMixer], Callable, Callable]] = {
    "kda": (lambda: KimiDeltaAttention(D_MODEL, H, K, V), kda_decay, kda_out),
    "kda, bounded": (lambda: KimiDeltaAttention(D_MODEL, H, K, V, decay_lower_bound=-3.0), bounded_decay, kda_out),
    "gdn": (lambda: GatedDeltaNet(D_MODEL, H, K, V), gdn_decay, gdn_out),
    "gdn, negative": (lambda: GatedDeltaNet(D_MODEL, H, K, V, negative_eigenvalues=True), gdn_decay, gdn_out),
    "deltanet": (lambda: DeltaNet(D_MODEL, H, K, V), no_decay, plain_out),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_matches_its_own_recurrence_with_gradients(case: str) -> None:
    """S_t = (I - beta k k^T) Diag(alpha) S_{t-1} + beta k v^T, o = S^T q / sqrt(K)."""
    make, decay, read_out = CASES[case]
    torch.manual_seed(0)
    layer = make().double()
    for p in layer.parameters():  # the paper's initialisation is so small that errors would hide
        if p.ndim > 1 or p is layer.norm.weight:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    x = torch.randn(2, 70, D_MODEL, dtype=torch.float64, requires_grad=True)
    q, k = (unit(heads(x @ p.weight.T, c)) for p, c in ((layer.q_proj, layer.conv_q), (layer.k_proj, layer.conv_k)))
    v, alpha = heads(x @ layer.v_proj.weight.T, layer.conv_v), decay(layer, x)
    beta = torch.sigmoid(x @ layer.gates.beta.weight.T) * (2 if "negative" in case else 1)
    S, outputs = x.new_zeros(2, H, K, V), []
    for t in range(70):
        outer = beta[:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None, :]
        decayed = alpha[:, t, ..., None] * S
        S = decayed - outer @ decayed + beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((S * q[:, t, ..., None]).sum(2) / K**0.5)
    expected = read_out(layer, torch.stack(outputs, dim=1), x).flatten(-2) @ layer.out_proj.weight.T

    y, state = layer(x)
    # Float64 on both sides: only the order of sums differs, over 70 tokens and, for the gradients, as many again.
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state.memory, S, rtol=1e-11, atol=1e-11)
    weights, leaves = torch.randn_like(y), [x, *layer.parameters()]
    got = torch.autograd.grad((y * weights).sum() + state.memory.sum(), leaves)
    own = torch.autograd.grad((expected * weights).sum() + S.sum(), leaves)
    for a, b in zip(got, own):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_state_and_sizes_are_those_of_the_delta_mixer() -> None:
    for layer in (KimiDeltaAttention(D_MODEL, H, K, V), GatedDeltaNet(D_MODEL, H, K, V), DeltaNet(D_MODEL, H, K, V)):
        assert [list(t.shape) for t in layer.initial_state(3)] == [[3, 3, 6], [3, 3, 6], [3, 3, 10], [3, 2, 3, 5]]
        with pytest.raises(ValueError, match="key_dim is 0; expected at least 1"):
            type(layer)(D_MODEL, H, 0)
