import torch

from gdn2.layers import SwiGLU


def test_swiglu_matches_its_formula() -> None:
    torch.manual_seed(0)
    mlp, x = SwiGLU(4, 6).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    gate, up = x @ mlp.gate.weight.t(), x @ mlp.up.weight.t()
    expected = (gate * torch.sigmoid(gate) * up) @ mlp.down.weight.t()
    torch.testing.assert_close(mlp(x), expected, rtol=1e-13, atol=1e-15)  # float64 rounding
    assert [list(p.shape) for p in mlp.parameters()] == [[6, 4], [6, 4], [4, 6]]
