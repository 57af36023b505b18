import pytest
import torch
import torch.nn.functional as F

from gdn2.layers.tied import DeltaNet, GatedDeltaNet, KimiDeltaAttention

D_MODEL, H, K, V = 7, 2, 3, 5


def test_state_and_sizes_are_those_of_the_delta_mixer() -> None:
    for layer in (KimiDeltaAttention(D_MODEL, H, K, V), GatedDeltaNet(D_MODEL, H, K, V), DeltaNet(D_MODEL, H, K, V)):
        assert [list(t.shape) for t in layer.initial_state(3)] == [[3, 3, 6], [3, 3, 6], [3, 3, 10], [3, 2, 3, 5]]
        with pytest.raises(ValueError, match="key_dim is 0; expected at least 1"):
            type(layer)(D_MODEL, H, 0)


def test_decays_start_as_in_their_papers() -> None:
    """One rate a head, log U(1, 16); one step for each channel of KDA's, for each head of Gated DeltaNet's."""
    torch.manual_seed(0)
    for layer, steps in ((KimiDeltaAttention(4, 500, K, V), 500 * K), (GatedDeltaNet(4, 500, K, V), 500)):
        rate, dt = layer.gates.decay.rate.exp(), F.softplus(layer.gates.decay.delta)
        assert (rate.shape, dt.shape) == ((500,), (steps,))
        assert 1 <= rate.min() < 1.5 < 15.5 < rate.max() <= 16  # 500 draws: the ends are within 0.2
        assert 0.99e-3 < dt.min() < 1.1e-3 < 0.9e-1 < dt.max() < 1.01e-1
    assert not KimiDeltaAttention(4, 2, K, V).output_gate[1].bias.any()
    assert DeltaNet(4, 2, K, V).gates.decay is None
