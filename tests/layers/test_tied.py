import pytest

from gdn2.layers.tied import DeltaNet, GatedDeltaNet, KimiDeltaAttention

D_MODEL, H, K, V = 7, 2, 3, 5


def test_state_and_sizes_are_those_of_the_delta_mixer() -> None:
    for layer in (KimiDeltaAttention(D_MODEL, H, K, V), GatedDeltaNet(D_MODEL, H, K, V), DeltaNet(D_MODEL, H, K, V)):
        assert [list(t.shape) for t in layer.initial_state(3)] == [[3, 3, 6], [3, 3, 6], [3, 3, 10], [3, 2, 3, 5]]
        with pytest.raises(ValueError, match="key_dim is 0; expected at least 1"):
            type(layer)(D_MODEL, H, 0)
