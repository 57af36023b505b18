import pytest
import torch
import torch.nn.functional as F

from gdn2.layers.norm import GatedRMSNorm, RMSNorm, l2_norm


def test_rms_norm_matches_its_formula() -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(6, eps=0.1).double(), torch.randn(3, 5, 6, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 0.1) * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-13, atol=1e-13)  # float64 rounding
    assert torch.equal(RMSNorm(6).weight, torch.ones(6))


def test_gated_rms_norm_multiplies_the_norm_by_silu_of_the_gate() -> None:
    torch.manual_seed(0)
    norm = GatedRMSNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    x, gate = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    expected = RMSNorm.forward(norm, x) * F.silu(gate)
    torch.testing.assert_close(norm(x, gate), expected, rtol=1e-13, atol=1e-13)  # float64 rounding


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_compute_in_float32_and_return_the_input_dtype(autocast: bool) -> None:
    torch.manual_seed(0)
    x, gate = 1e5 * torch.randn(4, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        narrow = RMSNorm(8).bfloat16()(x.bfloat16())
        gated = GatedRMSNorm(8).bfloat16()(x.bfloat16(), gate.bfloat16())
        unit = l2_norm(x.bfloat16())
    assert narrow.dtype == gated.dtype == unit.dtype == torch.bfloat16
    # Computed in float32 from the rounded input, each result differs from the exact one by its own rounding only.
    wide = x.bfloat16().float()
    half_a_bit = {"rtol": 2**-8, "atol": 1e-30}
    torch.testing.assert_close(narrow.float(), RMSNorm(8)(wide), **half_a_bit)
    torch.testing.assert_close(gated.float(), GatedRMSNorm(8)(wide, gate.bfloat16().float()), **half_a_bit)
    torch.testing.assert_close(unit.float(), l2_norm(wide), **half_a_bit)


def test_l2_norm_has_length_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 16, dtype=torch.float64)
    # eps = 1e-6 under the root shortens a vector of squared length s by 5e-7 / s; the shortest here has s > 3.
    torch.testing.assert_close(l2_norm(x).norm(dim=-1), torch.ones(10, dtype=torch.float64), rtol=0, atol=2e-7)


def test_l2_norm_of_zero_is_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    y = l2_norm(x)
    assert not y.any()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1e3))  # 1 / sqrt(eps)
