import pytest
import torch
import torch.nn.functional as F

from gdn2.layers.mamba2 import Mamba2


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
