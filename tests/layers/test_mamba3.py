"""Mamba-3's rotations, its angles over a long text, and how it starts."""

import math

import pytest
import torch

from gdn2.layers.mamba3 import Mamba3, accumulate, rotate_pairs


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
    steps = 0.1 * torch.rand(1, 131_072, 1, 2) - 0.02
    ticks = (steps.double() * 2**40).round().long()
    assert torch.equal(ticks.double() / 2**40, steps.double())
    exact = math.pi * ticks.cumsum(1).double() / 2**40
    start, parts = None, []
    for piece in steps.chunk(pieces, dim=1):
        angles, start = accumulate(piece, start, None)
        parts.append(angles)
    angles = torch.cat(parts, dim=1)
    assert angles.dtype == torch.float32
    assert (angles >= 0).all()
    # An angle below 2 pi is rounded to float32 once per piece, by at most 2.4e-7: a random walk of as many steps.
    assert distance(angles, exact) < 2.4e-7 * max(1, 3 * pieces**0.5)


def distance(angles: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest, in radians and modulo whole turns."""
    turns = (angles.double() - exact) / (2 * math.pi)
    return float(2 * math.pi * (turns - turns.round()).abs().max())


@torch.no_grad()
def test_angles_of_a_layer_do_not_drift_over_131072_tokens() -> None:
    """tanh is 1 and dt the same at each token, so that pi dt adds up: 41,000 radians."""
    mixer = Mamba3(1, 1, key_dim=4, value_dim=1)
    mixer.in_proj.weight.zero_()
    mixer.in_proj.weight[-1] = 20
    mixer.delta.fill_(-2.25)
    _, state = mixer(torch.ones(1, 131_072, 1))
    dt = torch.nn.functional.softplus(mixer.delta).double()
    assert distance(state.angles, math.pi * 131_072 * dt) < 2.4e-7  # one rounding of an angle below 2 pi to float32


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
    mixer = Mamba3(7, 3, key_dim=8, value_dim=5)
    with pytest.raises(ValueError, match=r"the state's angles have shape \[3, 3, 2\]; expected \[2, 3, 2\]"):
        mixer(torch.zeros(2, 4, 7), mixer.initial_state(3))
