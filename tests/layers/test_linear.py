import torch

from gdn2.layers.linear import Linear, at_least_float32, low_rank


def test_linear_starts_xavier_uniform_with_gain_2_to_minus_2_5() -> None:
    torch.manual_seed(0)
    linear = Linear(300, 500)
    bound = 2**-2.5 * (6 / (300 + 500)) ** 0.5
    assert linear.weight.abs().max() <= bound
    # The standard deviation of 150,000 uniform draws is known to about 0.1 %; 1 % is ten times that.
    assert abs(linear.weight.std().item() / (bound / 3**0.5) - 1) < 0.01
    assert not linear.bias.any()


def test_low_rank_has_its_only_bias_at_the_end() -> None:
    shapes = {name: list(p.shape) for name, p in low_rank(7, 2, 5, bias=True).named_parameters()}
    assert shapes == {"0.weight": [2, 7], "1.weight": [5, 2], "1.bias": [5]}
    assert [list(p.shape) for p in low_rank(7, 2, 5).parameters()] == [[2, 7], [5, 2]]


def test_at_least_float32() -> None:
    kinds = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    assert [at_least_float32(torch.ones(1, dtype=d)).dtype for d in kinds] == [torch.float32] * 3 + [torch.float64]
