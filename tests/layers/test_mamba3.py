"""Mamba-3 against its own recurrence, token by token, written from its paper; and its angles over a long text."""

import math

import pytest
import torch
from torch import Tensor

from gdn2.layers.mamba3 import Mamba3, accumulate, rotate_pairs

H, K, V, D_MODEL = 3, 8, 5, 7


def layer(rank: int, rope_fraction: float) -> Mamba3:
    """With weights so large that errors show."""
    torch.manual_seed(0)
    layer = Mamba3(D_MODEL, H, K, V, rank, rope_fraction).double()
    for p in layer.parameters():
        if p is not layer.delta:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return layer


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotation(theta: Tensor) -> Tensor:
    """[B, H, pairs] -> [B, H, K, K]: block-diagonal rotations, the identity beyond the pairs."""
    matrix = torch.eye(K, dtype=theta.dtype).expand(*theta.shape[:2], K, K).clone()
    for i in range(theta.shape[-1]):
        c, s = torch.cos(theta[..., i]), torch.sin(theta[..., i])
        block = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
        matrix[..., 2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
    return matrix


def token_by_token(layer: Mamba3, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, d_model] -> y, the final state [B, H, K, V] and the last angles [B, H, pairs], not reduced."""
    (B, T, _), R, pairs = x.shape, layer.rank, layer.pairs
    S, theta = x.new_zeros(B, H, K, V), x.new_zeros(B, H, pairs)
    before, outputs = None, []
    for t in range(T):
        projected = x[:, t] @ layer.in_proj.weight.T
        z, u, b, c, dt, a, lam, phi = projected.split([H * V, H * V, R * K, R * K, H, H, H, pairs], dim=1)
        z, u = z.view(B, H, V), u.view(B, H, V)
        dt, A, lam = softplus(dt + layer.delta), -softplus(a).clamp(min=1e-4), torch.sigmoid(lam)
        theta = theta + math.pi * torch.tanh(phi)[:, None] * dt[..., None]
        turn, S = rotation(theta), torch.exp(A * dt)[..., None, None] * S
        if before is not None:
            S = S + ((1 - lam) * dt * torch.exp(A * dt))[..., None, None] * before
        k, q = (
            [turn @ (rms(p[:, r * K : (r + 1) * K], w)[:, None] + bias[r])[..., None] for r in range(R)]
            for p, w, bias in (
                (b, layer.key_norm.weight, layer.key_bias),
                (c, layer.query_norm.weight, layer.query_bias),
            )
        )
        values = [u * layer.mimo_value[r] if R > 1 else u for r in range(R)]
        before = sum(k_r * v_r[:, :, None] for k_r, v_r in zip(k, values))
        S = S + (lam * dt)[..., None, None] * before
        y = 0
        for r in range(R):
            o = (S * q[r]).sum(2) + layer.skip[:, None] * values[r]
            gate = z * layer.mimo_gate[r] if R > 1 else z
            o = o * gate * torch.sigmoid(gate)
            y = y + (o * layer.mimo_out[r] if R > 1 else o)
        outputs.append(y.reshape(B, H * V) @ layer.out_proj.weight.T)
    return torch.stack(outputs, dim=1), S, theta


@pytest.mark.parametrize(("rank", "rope_fraction"), [(1, 0.5), (1, 1.0), (4, 0.5)])
def test_layer_matches_its_own_recurrence_with_gradients(rank: int, rope_fraction: float) -> None:
    mixer, x = layer(rank, rope_fraction), torch.randn(2, 70, D_MODEL, dtype=torch.float64, requires_grad=True)
    y, state = mixer(x)
    expected, S, theta = token_by_token(mixer, x)
    # Float64 on both sides: only the order of sums differs, over 70 tokens and, for the gradients, as many again.
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state.memory, S, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state.angles, theta.remainder(2 * math.pi), rtol=1e-11, atol=1e-11)
    weights, leaves = torch.randn_like(y), [x, *mixer.parameters()]
    got = torch.autograd.grad((y * weights).sum() + state.memory.sum(), leaves)
    own = torch.autograd.grad((expected * weights).sum() + S.sum(), leaves)
    for a, b in zip(got, own):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_rotation_depends_on_the_difference_of_angles_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 8, dtype=torch.float64)
    near, far = torch.rand(2, 4, 3, dtype=torch.float64)
    both = (rotate_pairs(q, near + far) * rotate_pairs(k, near)).sum(-1)
    torch.testing.assert_close(both, (rotate_pairs(q, far) * k).sum(-1), rtol=1e-13, atol=1e-13)  # float64 rounding
    assert torch.equal(rotate_pairs(q, near)[:, 6:], q[:, 6:])


@pytest.mark.parametrize("pieces", [1, 37, 8_192], ids=lambda n: f"in {n}")
def test_angles_do_not_drift_over_131072_tokens(pieces: int) -> None:
    """Against integers: the steps, float32 numbers, are multiples of 2^-40, so that these sum without error."""
    torch.manual_seed(0)
    steps = 0.3 * torch.rand(1, 131_072, 1, 2) - 0.05
    ticks = (steps.double() * 2**40).round().long()
    assert torch.equal(ticks.double() / 2**40, steps.double())
    exact = ticks.cumsum(1).double() / 2**40
    start, parts = None, []
    for piece in steps.chunk(pieces, dim=1):
        angles, start = accumulate(piece, start, None)
        parts.append(angles)
    angles = torch.cat(parts, dim=1)
    assert angles.dtype == torch.float32
    assert (angles >= 0).all()
    turns = (angles.double() - exact) / (2 * math.pi)
    error = 2 * math.pi * (turns - turns.round()).abs().max()
    # An angle below 2 pi is rounded to float32 once per piece, by at most 2.4e-7: a random walk of as many steps.
    assert error < 2.4e-7 * max(1, 3 * pieces**0.5)


def test_layer_starts_as_in_its_paper() -> None:
    torch.manual_seed(0)
    mixer = Mamba3(1, 20_000, 2, 1, mimo_rank=4, rope_fraction=1.0)
    assert abs(torch.nn.functional.softplus(mixer.delta).log().mean() - torch.tensor(0.01).log()) < 0.03  # 20,000 draws
    for ones in (mixer.key_bias, mixer.query_bias, mixer.skip, mixer.mimo_gate):
        assert torch.equal(ones, torch.ones_like(ones))
    for quarters in (mixer.mimo_value, mixer.mimo_out):
        assert torch.equal(quarters, torch.full_like(quarters, 0.25))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mimo_rank": 0}, "mimo_rank is 0; expected at least 1"),
        ({"key_dim": 0}, "key_dim is 0; expected at least 1"),
        ({"rope_fraction": 0.0}, "rope_fraction is 0.0 of 8 key channels; expected an even number from 2 to all"),
        ({"rope_fraction": 0.3}, "rope_fraction is 0.3 of 8 key channels"),
        ({"rope_fraction": 1.5}, "rope_fraction is 1.5 of 8 key channels"),
    ],
)
def test_bad_sizes_are_named(keywords: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba3(**{"d_model": 8, "num_heads": 2, "key_dim": 8, **keywords})


def test_a_state_of_another_batch_is_refused() -> None:
    mixer = layer(1, 0.5)
    with pytest.raises(ValueError, match=r"the state's angles have shape \[3, 3, 2\]; expected \[2, 3, 2\]"):
        mixer(torch.zeros(2, 4, D_MODEL, dtype=torch.float64), mixer.initial_state(3))
