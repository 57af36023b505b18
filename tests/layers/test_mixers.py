"""What every token mixer owes besides its mathematics: narrow dtypes, compiling, meta device, where its state lives."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from gdn2.layers import (
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaNet2,
    KimiDeltaAttention,
    LinearAttention,
    Mamba2,
    Mamba3,
    SlidingWindowAttention,
)

MIXERS: dict[str, Callable[[], nn.Module]] = {
    "gdn2, ablated": lambda: GatedDeltaNet2(
        32, 2, key_dim=16, value_dim=16, channel_erase=False, channel_write=False, decay_lower_bound=-5.0
    ),
    "kda": lambda: KimiDeltaAttention(32, 2, 16, 16),
    "gdn": lambda: GatedDeltaNet(32, 2, 16, 16),
    "deltanet": lambda: DeltaNet(32, 2, 16, 16),
    "linear": lambda: LinearAttention(32, 2, 16, 16),
    "mamba2": lambda: Mamba2(32, 4, 16, 16),
    "mamba3": lambda: Mamba3(32, 4, 16, 16),
    "mamba3-mimo": lambda: Mamba3(32, 4, 16, 16, mimo_rank=4),
}


@pytest.fixture(params=MIXERS.values(), ids=MIXERS.keys())
def mixer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    mixer = request.param()
    for p in mixer.parameters():  # the initialisation is so small that errors would hide
        if p.ndim == 2 and not hasattr(p, "no_weight_decay"):
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return mixer


def test_bfloat16_and_autocast_stay_near_float32(mixer: nn.Module) -> None:
    x = torch.randn(2, 20, 32)
    exact, exact_state = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast, state = mixer(x, mixer.initial_state(2))
        continued, _ = mixer(x, state)
    narrow = deepcopy(mixer).bfloat16()
    narrowed, narrow_state = narrow(x.bfloat16())
    assert cast.dtype == continued.dtype == narrowed.dtype == torch.bfloat16
    assert [t.dtype for t in narrow_state] == [t.dtype for t in narrow.initial_state(2)]
    assert state.memory.dtype == torch.float32
    assert narrow_state.memory.shape == exact_state.memory.shape
    for y in (cast, narrowed):
        # A dozen roundings to 8 bits (0.4 % each) along the way; Mamba-3 has no norm behind its memory.
        assert (y.float() - exact).norm() < 0.03 * exact.norm()
    cast.float().square().mean().backward()
    narrowed.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for m in (mixer, narrow) for p in m.parameters())


def test_decay_parameters_stay_float32_and_take_no_weight_decay(mixer: nn.Module) -> None:
    kept = {name for m in mixer.modules() for name in getattr(m, "float32_parameters", ())}
    for p in mixer.bfloat16().named_parameters():
        assert (p[1].dtype == torch.float32) == (p[0].split(".")[-1] in kept)
        assert hasattr(p[1], "no_weight_decay") == (p[0].split(".")[-1] in kept)


def test_leaving_the_meta_device_and_resetting_reaches_every_parameter(mixer: nn.Module) -> None:
    with torch.device("meta"):
        empty = deepcopy(mixer).to("meta")
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for p in empty.parameters():
            p.fill_(float("nan"))
    for m in empty.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    assert all(p.isfinite().all() and p.device.type == "cpu" for p in empty.parameters())


def test_state_is_that_of_the_first_call_and_left_out_on_request(mixer: nn.Module) -> None:
    state = mixer.initial_state(3)
    _, after = mixer(torch.randn(3, 2, 32))
    assert type(after) is type(state)
    assert [(t.shape, t.dtype) for t in after] == [(t.shape, t.dtype) for t in state]
    assert all(not t.any() for t in state)
    assert all(t.device.type == "meta" for t in mixer.initial_state(1, device="meta"))
    assert mixer(torch.randn(3, 2, 32), output_state=False)[1] is None


def test_state_of_another_kind_of_mixer_is_refused(mixer: nn.Module) -> None:
    own = type(mixer.initial_state(1)).__name__
    for other in (SlidingWindowAttention(32, 2, window=4), Mamba2(32, 4, 16, 16), Mamba3(32, 4, 16, 16)):
        state = other.initial_state(2)
        if type(state).__name__ != own:
            message = f"state is a {type(state).__name__}; expected {own} or None"
            with pytest.raises(ValueError, match=message):
                mixer(torch.randn(2, 3, 32), state)
            with pytest.raises(ValueError, match=f"state is a {own}; expected {type(state).__name__} or None"):
                other(torch.randn(2, 3, 32), mixer.initial_state(2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
@pytest.mark.parametrize("name", ["kda", "mamba2", "mamba3-mimo"])
def test_whole_graph_compiles(name: str) -> None:
    torch.manual_seed(0)
    mixer, x = MIXERS[name](), torch.randn(1, 9, 32)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for cu_seqlens in (None, torch.tensor([0, 2, 2, 9])):
        state = mixer.initial_state(1 if cu_seqlens is None else 3)
        results: list[tuple[Tensor, ...]] = []
        for m in (compiled, mixer):
            y, after = m(x, state, cu_seqlens)
            results.append((y, *after))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # the same operations, possibly fused: float32
    torch._dynamo.reset()
