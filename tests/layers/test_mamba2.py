"""Mamba-2 against its own recurrence, token by token and tap by tap, written from its paper."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.layers.mamba2 import Mamba2

H, K, V, WIDTH, D_MODEL = 3, 4, 5, 3, 7


def layer() -> Mamba2:
    """With weights so large that errors show."""
    torch.manual_seed(0)
    layer = Mamba2(D_MODEL, H, K, V, WIDTH).double()
    for p in (layer.in_proj.weight, layer.out_proj.weight, layer.norm.weight, layer.skip):
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return layer


def token_by_token(layer: Mamba2, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, d_model] -> y and the final state [B, H, K, V]."""
    B, T, _ = x.shape
    S, inputs, outputs = x.new_zeros(B, H, K, V), [x.new_zeros(B, H * V + 2 * K)] * WIDTH, []
    for t in range(T):
        projected = layer.in_proj.weight @ x[:, t].T
        z, u, dt = projected.T.split([H * V, H * V + 2 * K, H], dim=1)
        inputs = [*inputs[1:], u]
        u = F.silu(sum(layer.conv[:, j] * inputs[j] for j in range(WIDTH)))
        values, B_t, C_t = u[:, : H * V].view(B, H, V), u[:, H * V : H * V + K], u[:, H * V + K :]
        dt = torch.log1p(torch.exp(dt + layer.delta))
        A = -torch.exp(layer.rate)
        written = B_t[:, None, :, None] * (dt[..., None] * values)[:, :, None]
        S = torch.exp(A * dt)[..., None, None] * S + written
        o = (S * C_t[:, None, :, None]).sum(2) + layer.skip[:, None] * values
        gated = o.reshape(B, H * V) * z * torch.sigmoid(z)
        normed = gated / (gated.square().mean(1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
        outputs.append(normed @ layer.out_proj.weight.T)
    return torch.stack(outputs, dim=1), S


def test_layer_matches_its_own_recurrence_with_gradients() -> None:
    mixer, x = layer(), torch.randn(2, 70, D_MODEL, dtype=torch.float64, requires_grad=True)
    y, state = mixer(x)
    expected, S = token_by_token(mixer, x)
    # Float64 on both sides: only the order of sums differs, over 70 tokens and, for the gradients, as many again.
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state.memory, S, rtol=1e-11, atol=1e-11)
    assert torch.equal(state.conv, mixer.in_proj(x)[:, 1 - WIDTH :, H * V : -H])
    weights, leaves = torch.randn_like(y), [x, *mixer.parameters()]
    got = torch.autograd.grad((y * weights).sum() + state.memory.sum(), leaves)
    own = torch.autograd.grad((expected * weights).sum() + S.sum(), leaves)
    for a, b in zip(got, own):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_layer_starts_as_in_its_paper() -> None:
    """rate = log U(1, 16), dt log-uniform in [1e-3, 1e-1]: means of 20,000 draws, known to about 1 %."""
    torch.manual_seed(0)
    mixer = Mamba2(1, 20_000, 1, 1)
    assert abs(mixer.rate.exp().mean() - 8.5) < 0.15
    assert 1 <= mixer.rate.exp().min() <= mixer.rate.exp().max() <= 16
    assert abs(F.softplus(mixer.delta).log().mean() - torch.tensor(0.01).log()) < 0.03
    assert torch.equal(mixer.skip, torch.ones(20_000))
    assert 0.49 < mixer.conv.abs().max() <= 0.5


@pytest.mark.parametrize("size", ["d_model", "num_heads", "key_dim", "value_dim", "conv_width"])
def test_bad_sizes_are_named(size: str) -> None:
    with pytest.raises(ValueError, match=f"{size} is 0; expected at least 1"):
        Mamba2(**{"d_model": 8, "num_heads": 2, size: 0})
