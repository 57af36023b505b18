import math

import pytest
import torch
import torch.nn.functional as F

from gdn2.layers.gates import ChannelGates, DecayGate


def decay_gate(heads: int = 3, key_dim: int = 4) -> DecayGate:
    torch.manual_seed(0)
    return DecayGate(d_model=10, num_heads=heads, key_dim=key_dim, rank=5)


def test_log_decay_is_minus_exp_rate_times_softplus() -> None:
    gate, x = decay_gate().double(), torch.randn(2, 6, 10, dtype=torch.float64)
    f = (x @ gate.projection[0].weight.t() @ gate.projection[1].weight.t()).view(2, 6, 3, 4)
    expected = -gate.rate.exp().view(3, 1) * F.softplus(f + gate.delta.view(3, 4))
    torch.testing.assert_close(gate(x), expected, rtol=1e-13, atol=1e-13)  # float64 rounding
    assert (gate(x) <= 0).all()


def test_decay_gate_starts_as_in_the_paper() -> None:
    """rate = log U(1, 16); softplus(delta) log-uniform in [1e-3, 1e-1]. Means of 20,000 draws, known to about 1 %."""
    torch.manual_seed(0)
    gate = DecayGate(d_model=1, num_heads=20_000, key_dim=1, rank=1)
    rate, log_dt = gate.rate.exp(), F.softplus(gate.delta).log()
    assert 1 <= rate.min() < 1.01
    assert 15.9 < rate.max() <= 16
    assert abs(rate.mean() - 8.5) < 0.15
    low, high = math.log(1e-3), math.log(1e-1)
    assert low - 1e-4 < log_dt.min() < low + 0.01  # 1e-4: the inverse softplus and back, in float32
    assert high - 0.01 < log_dt.max() < high + 1e-4
    assert abs(log_dt.mean() - (low + high) / 2) < 0.03


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_float32_parameters_survive_a_narrow_cast_bit_for_bit(cast: torch.dtype) -> None:
    gate = decay_gate()
    gate(torch.randn(1, 3, 10)).sum().backward()
    kept = {name: getattr(gate, name) for name in gate.float32_parameters}
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in kept.items()}
    torch.nn.Sequential(gate).to(cast)
    assert gate.projection[0].weight.dtype == gate.projection[0].weight.grad.dtype == cast
    for name, (value, gradient) in before.items():
        p = getattr(gate, name)
        assert p.dtype == p.grad.dtype == torch.float32
        assert torch.equal(p, value)
        assert torch.equal(p.grad, gradient)
    assert gate.double().rate.dtype == torch.float64
    assert gate.to(cast).rate.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_decay_parameters_are_marked_on_either_way_in(device: str) -> None:
    with torch.device(device):
        gate = DecayGate(10, 3, 4, 5)
    if device == "meta":
        gate.to_empty(device="cpu").reset_parameters()
    for p in (gate.rate, gate.delta):
        assert p.no_weight_decay
        assert p.device.type == "cpu"
        assert p.isfinite().all()
    assert not hasattr(gate.projection[0].weight, "no_weight_decay")


def test_log_decay_is_float32_in_a_bfloat16_model_and_under_autocast() -> None:
    gate, x = decay_gate(), torch.randn(2, 6, 10)
    exact = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gate(x)
    narrow = gate.bfloat16()(x.bfloat16())
    assert cast.dtype == narrow.dtype == torch.float32
    for g in (cast, narrow):
        # Only W_f x, about 0.05 in size, is rounded to 8 bits: 2e-4 in the logarithm of softplus.
        torch.testing.assert_close(g, exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize(("negative", "largest"), [(False, 1), (True, 2)])
def test_negative_eigenvalues_double_the_erase_gate_and_not_the_write_gate(negative: bool, largest: int) -> None:
    torch.manual_seed(0)
    gates = ChannelGates(6, 2, 4, 3, 5, negative_eigenvalues=negative).double()
    x = 100 * torch.randn(2, 50, 6, dtype=torch.float64)
    log_decay, erase, write = gates(x)
    assert log_decay.shape == erase.shape == (2, 50, 2, 3)
    assert write.shape == (2, 50, 4, 5)
    expected_erase = largest * torch.sigmoid(x @ gates.erase.weight.t()).view(2, 50, 2, 3)
    expected_write = torch.sigmoid(x @ gates.write.weight.t()).view(2, 50, 4, 5)
    torch.testing.assert_close(erase, expected_erase, rtol=1e-13, atol=1e-13)  # float64 rounding
    torch.testing.assert_close(write, expected_write, rtol=1e-13, atol=1e-13)
    assert largest - 0.01 < erase.max() <= largest
    assert write.max() <= 1


@pytest.mark.parametrize("bound", [-5.0, -1.0])
def test_bounded_log_decay_is_the_bound_times_a_sigmoid_and_starts_at_the_same_decay(bound: float) -> None:
    torch.manual_seed(0)
    gate = DecayGate(10, 3, 4, rank=5, lower_bound=bound).double()
    x = torch.randn(2, 6, 10, dtype=torch.float64)
    f = (x @ gate.projection[0].weight.t() @ gate.projection[1].weight.t() + gate.delta).view(2, 6, 3, 4)
    expected = bound / (1 + torch.exp(-gate.rate.exp().view(3, 1) * f))
    torch.testing.assert_close(gate(x), expected, rtol=1e-12, atol=0)  # float64 rounding
    assert (gate(1e3 * x) >= bound).all()
    torch.manual_seed(0)
    unbounded = DecayGate(10, 3, 4, rank=5).double()
    start = unbounded(torch.zeros_like(x)).clamp(min=bound / 2)
    torch.testing.assert_close(gate(torch.zeros_like(x)), start, rtol=1e-5, atol=0)  # delta was made in float32


def test_a_bound_that_is_not_below_zero_is_refused() -> None:
    for bound in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"lower bound of the log-decay is {bound}; expected a number below 0"):
            DecayGate(10, 3, 4, 5, lower_bound=bound)


@pytest.mark.parametrize("ablated", ["erase", "write"])
def test_ablated_gate_is_the_mean_over_channels_with_as_many_parameters(ablated: str) -> None:
    torch.manual_seed(0)
    whole = ChannelGates(6, 2, 4, 3, 5).double()
    gates = ChannelGates(6, 2, 4, 3, 5, channel_erase=ablated != "erase", channel_write=ablated != "write").double()
    gates.load_state_dict(whole.state_dict())
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    for name, got, full in zip(("decay", "erase", "write"), gates(x), whole(x)):
        expected = full.mean(-1, keepdim=True) if name == ablated else full
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)  # float64 rounding
    assert whole.plain
    assert not gates.plain
    assert not ChannelGates(6, 2, 4, 3, 5, decay_lower_bound=-5.0).plain
