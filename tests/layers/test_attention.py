import math
from typing import Any

import pytest
import token_by_token
import torch
from torch import Tensor

from gdn2.layers import AttentionState, SlidingWindowAttention
from gdn2.layers.attention import _blocked, _masked, mean_keys, rotary_angles, rotary_frequencies, rotate


def attention(window: int | None, d_model: int = 12, heads: int = 2) -> SlidingWindowAttention:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(d_model, heads, window, rope_base=100.0).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return layer


@pytest.mark.parametrize("window", [1, 3, 5, 8, 19, 100, None])
def test_layer_matches_the_definition(window: int | None) -> None:
    """Windows that give the causal (T <= W), the masked (T <= 2W) and the blocked form."""
    layer = attention(window)
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    y, _ = layer(x)
    # Angles are rounded to float32, 3e-7 for an angle near 2 pi, and move the outputs (near 1) by about that.
    torch.testing.assert_close(y, token_by_token.attention(layer, x, window, 100.0)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 17, 23])
@pytest.mark.parametrize(("with_state", "packed"), [(False, False), (True, False), (False, True)])
def test_blocked_matches_masked(tokens: int, with_state: bool, packed: bool) -> None:
    torch.manual_seed(0)
    W, B = 4, 1 if packed else 2
    q, k, v = (torch.randn(B, tokens, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    positions, document, state = torch.arange(tokens)[None], None, None
    if packed:
        document = (torch.arange(tokens) >= 2).long() + (torch.arange(tokens) >= 9)
    if with_state:  # one ring that has gone round, one that is not yet full
        ring = torch.randn(2, B, W, 2, 6, dtype=torch.float64)
        state = AttentionState(ring[0], ring[1], torch.tensor([10, 3]))
        positions = positions + state.position[:, None]
    results = []
    for form in (_blocked, _masked):
        o = form(q, k, v, positions, document, state, W)
        results.append((o, *torch.autograd.grad((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum(), (q, k, v))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # float64 rounding of sums over at most 4 keys


def test_ring_holds_each_token_in_the_slot_of_its_position() -> None:
    layer = attention(window=4)
    x = torch.randn(1, 11, 12, dtype=torch.float64)
    values = layer.v_proj(x)[0].unflatten(-1, (2, 6))
    for seen in (0, 3, 4, 5, 11):
        _, state = layer(x[:, :seen])
        assert state.position.tolist() == [seen]
        for t in range(max(0, seen - 4), seen):
            torch.testing.assert_close(state.values[0, t % 4], values[t], rtol=0, atol=1e-14)  # float64 rounding
        assert not state.values[0, seen:].any()  # slots that no token has reached


def test_long_sequences_take_linear_memory() -> None:
    """No tensor, forward or backward, is near T x T: the largest, a block's distances, has T x 2W numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, Tensor):
                    self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
            return out

    T, W = 4096, 16
    layer = SlidingWindowAttention(8, 2, W)
    x = torch.randn(1, T, 8)
    for cu_seqlens in (None, torch.tensor([0, 1, 1, 700, T])):
        with Largest() as largest:
            layer(x, None, cu_seqlens)[0].sum().backward()
        assert largest.nbytes <= 2 * T * 2 * W * 8  # distances are int64; a factor of 2 to spare, T x T would be 128


def test_rotary_angles_are_exact_at_a_million_tokens() -> None:
    positions = torch.tensor([[0, 1, 999_999, 1_000_000]])
    angles = rotary_angles(positions, rotary_frequencies(8, 10_000.0))
    for t, position in enumerate(positions[0].tolist()):
        for i in range(4):
            exact = math.fmod(position * 10_000.0 ** (-2 * i / 8), 2 * math.pi)
            # Rounding an angle below 2 pi to float32: at most 2.4e-7; the float64 product adds 1e-10.
            assert abs(angles[0, t, i].item() - exact) < 3e-7


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64)
    frequencies = rotary_frequencies(64, 10_000.0)
    for base in (0, 1_000_000):
        at, back = (rotary_angles(torch.tensor([[base + d]]), frequencies) for d in (37, 0))
        score = (rotate(q, at) * rotate(k, back)).sum()
        # 64 float32 products of numbers near 1, rotated by angles good to 3e-7: a few 1e-6.
        torch.testing.assert_close(
            score, (rotate(q, rotary_angles(torch.tensor([[37]]), frequencies)) * k).sum(), rtol=0, atol=2e-5
        )


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all() -> None:
    plain, longer = rotary_frequencies(64, 10_000.0), rotary_frequencies(64, 10_000.0, "ntk", 8.0)
    ratio = plain / longer
    assert ratio[0] == 1
    assert ratio[-1].item() == pytest.approx(8, rel=1e-12)
    assert (ratio.diff() > 0).all()


def test_yarn_slows_what_turns_less_than_once_and_keeps_what_turns_32_times() -> None:
    factor, length = 4.0, 2_048
    plain, longer = (rotary_frequencies(64, 10_000.0, *extra) for extra in ((), ("yarn", factor, length)))
    for before, after in zip(plain.tolist(), longer.tolist()):
        turns = length * before / (2 * math.pi)
        ramp = 0 if turns < 1 else 1 if turns > 32 else (turns - 1) / 31
        assert after == pytest.approx((1 - ramp) * before / factor + ramp * before, rel=1e-12)
    assert longer[0] == plain[0]
    assert longer[-1] == plain[-1] / factor


@pytest.mark.parametrize("scaling", ["ntk", "yarn"])
@pytest.mark.parametrize("window", [4, 12, None], ids=["blocked", "masked", "causal"])
def test_scaled_layer_is_the_plain_one_with_other_frequencies_and_sharper_scores(
    monkeypatch: pytest.MonkeyPatch, scaling: str, window: int | None
) -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(12, 2, window, 100.0, scaling, 3.0, 16).double()
    plain = SlidingWindowAttention(12, 2, window, 100.0).double()
    plain.load_state_dict(layer.state_dict())
    sharper = (1 + 0.1 * math.log(3)) ** 2 if scaling == "yarn" else 1
    with torch.no_grad():
        plain.q_proj.weight *= sharper
    frequencies = rotary_frequencies(6, 100.0, scaling, 3.0, 16)
    x = 10 * torch.randn(2, 19, 12, dtype=torch.float64)
    y = layer(x)[0]
    assert not torch.allclose(y, plain(x)[0], rtol=1e-3)
    monkeypatch.setattr("gdn2.layers.attention.rotary_frequencies", lambda *_, **__: frequencies)
    torch.testing.assert_close(y, plain(x)[0], rtol=1e-12, atol=1e-12)  # float64, one more rounding of the scale


def test_layer_in_bfloat16_and_under_autocast() -> None:
    layer = attention(4).float()
    x = torch.randn(2, 20, 12)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast, state = layer(x, layer.initial_state(2))
    narrow, _ = attention(4).bfloat16()(x.bfloat16())
    assert cast.dtype == narrow.dtype == state.keys.dtype == torch.bfloat16
    for y in (cast, narrow):
        assert (y.float() - exact).norm() < 0.03 * exact.norm()  # half a dozen roundings to 8 bits, 0.4 % each


def test_whole_graph_compiles() -> None:
    for window in (4, None):
        layer, x = attention(window), torch.randn(1, 9, 12, dtype=torch.float64)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            y, state = compiled(x)
        torch.testing.assert_close(y, layer(x)[0])
        torch.testing.assert_close(compiled(x, state)[0], layer(x, state)[0])
    torch._dynamo.reset()


def test_state_is_left_out_on_request() -> None:
    for window in (4, None):
        layer, x = attention(window), torch.randn(1, 9, 12, dtype=torch.float64)
        for cu_seqlens in (None, torch.tensor([0, 4, 9])):
            y, state = layer(x, None, cu_seqlens, output_state=False)
            assert state is None
            assert torch.equal(y, layer(x, None, cu_seqlens)[0])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_heads": 5}, r"num_heads is 5; expected a divisor of d_model \(12\) into even heads"),
        ({"num_heads": 4}, "num_heads is 4"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 2, "window": 0}, "window is 0; expected at least 1, or None"),
        ({"num_heads": 2, "rope_scaling": "linear"}, "rope_scaling is 'linear'; expected 'none', 'ntk' or 'yarn'"),
        ({"num_heads": 2, "rope_factor": 2.0}, "rope_factor is 2.0; expected at least 1, and 1 without rope_scaling"),
        ({"num_heads": 2, "rope_scaling": "yarn", "rope_factor": 0.5}, "rope_factor is 0.5; expected at least 1"),
        ({"num_heads": 6, "rope_scaling": "ntk"}, "rope_scaling is 'ntk' with heads of 2 channels; expected 4 or more"),
    ],
)
def test_bad_arguments_are_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttention(12, **keywords)


@pytest.mark.parametrize("window", [4, None])
def test_a_state_that_does_not_fit_is_refused(window: int | None) -> None:
    layer = attention(window)
    message = r"state has keys \[3, .*\]; expected \[2, .*, 2, 6\], the same and \[2\]"
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(2, 1, 12, dtype=torch.float64), layer.initial_state(3))


@pytest.mark.parametrize(("context", "window"), [(1, 1), (5, 8), (8, 5), (100, 1), (7, 7)])
def test_mean_keys_by_counting(context: int, window: int) -> None:
    counted = sum(min(t + 1, window) for t in range(context)) / context
    assert mean_keys(context, window) == pytest.approx(counted, rel=1e-15)
