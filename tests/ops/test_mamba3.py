"""Mamba-3's rule against its own recurrence, token by token, independent of the operator."""

import inspect

import pytest
import torch
from operands import relative

from gdn2.ops import Mamba3Memory, gated_delta_rule_2, mamba3

B, T, H, K, V = 2, 70, 2, 6, 5
# float64 on both sides; only the order of sums differs.
EXACT = 1e-13
NAMES = ("q", "k", "v", "log_decay", "dt", "lam", "memory", "key", "value")


@pytest.fixture(params=[(), (1,), (4,)], ids=["SISO", "MIMO of rank 1", "MIMO of rank 4"])
def x(request):
    """Leaves by name; q, k, v [B, T, (R,) H, .], log_decay, dt, lam [B, T, H], and a state of two sequences."""
    torch.manual_seed(0)
    normal = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
    uniform = lambda *s: torch.rand(*s, dtype=torch.float64)  # noqa: E731
    rank = request.param
    tensors = (
        normal(B, T, *rank, H, K), normal(B, T, *rank, H, K), normal(B, T, *rank, H, V),
        -uniform(B, T, H), uniform(B, T, H), uniform(B, T, H),
        normal(B, H, K, V), normal(B, *rank, H, K), normal(B, *rank, H, V),
    )  # fmt: skip
    return dict(zip(NAMES, (t.requires_grad_() for t in tensors)))


def rule(x, **options):
    state = Mamba3Memory(x["memory"], x["key"], x["value"])
    return mamba3(*(x[n] for n in NAMES[:6]), initial_state=state, output_final_state=True, **options)


def own(x, scale=1.0):
    """S_t = alpha S_{t-1} + eta k_{t-1} v_{t-1}^T + zeta k_t v_t^T, o = S_t^T q, each pair of vectors in turn."""
    q, k, v, key, value = (x[n] for n in ("q", "k", "v", "key", "value"))
    if q.ndim == 4:
        q, k, v, key, value = (t.unsqueeze(-3) for t in (q, k, v, key, value))
    S, out = x["memory"], []
    for t in range(q.shape[1]):
        alpha, dt, lam = x["log_decay"][:, t].exp(), x["dt"][:, t], x["lam"][:, t]
        S = alpha[..., None, None] * S
        for r in range(q.shape[2]):
            for weight, a, b in (((1 - lam) * dt * alpha, key[:, r], value[:, r]), (lam * dt, k[:, t, r], v[:, t, r])):
                S = S + weight[..., None, None] * a[..., :, None] * b[..., None, :]
        out.append(torch.stack([(S * (scale * q[:, t, r])[..., None]).sum(2) for r in range(q.shape[2])], dim=1))
        key, value = k[:, t], v[:, t]
    o = torch.stack(out, dim=1)
    state = (S, key, value) if x["q"].ndim == 5 else (S, key.squeeze(1), value.squeeze(1))
    return o.view(x["v"].shape), state


def gradients(result, leaves):
    """Of a sum in which every number counts differently."""
    o, state = result
    total = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in (o, *state))
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("scale", [1.0, None])
def test_rule_matches_its_own_recurrence_with_gradients(x, backend, scale):
    got, expected = rule(x, backend=backend, scale=scale), own(x, K**-0.5 if scale is None else scale)
    for a, b in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert relative(a, b) < EXACT
    for a, b in zip(gradients(got, list(x.values())), gradients(expected, list(x.values())), strict=True):
        assert relative(a, b) < EXACT


@pytest.mark.parametrize("cuts", [[70], [1] * 5 + [65], [0, 64, 0, 6], [63, 7]], ids=["1", "steps", "empty", "2"])
def test_split_sequence_matches_whole(x, cuts):
    state, outputs = Mamba3Memory(x["memory"], x["key"], x["value"]), []
    for parts in zip(*(x[n].split(cuts, dim=1) for n in NAMES[:6])):
        o, state = mamba3(*parts, initial_state=state, output_final_state=True)
        outputs.append(o)
    whole = rule(x)
    got = torch.cat(outputs, dim=1), state
    for a, b in zip((got[0], *got[1]), (whole[0], *whole[1]), strict=True):
        assert relative(a, b) < EXACT
    for a, b in zip(gradients(got, list(x.values())), gradients(whole, list(x.values()))):
        assert relative(a, b) < EXACT


@pytest.mark.parametrize("lengths", [[0, 70], [69, 1], [5, 65], [70, 0]], ids=str)
@pytest.mark.parametrize("fresh", [True, False], ids=["from nothing", "from a state"])
def test_packed_matches_separate(x, lengths, fresh):
    row = {n: x[n][:1].detach().requires_grad_() for n in NAMES[:6]}
    state = None if fresh else Mamba3Memory(x["memory"], x["key"], x["value"])
    leaves = [*row.values(), *(state or ())]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = mamba3(*row.values(), initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    outputs, states = [], []
    for n, parts in enumerate(zip(*(t.split(lengths, dim=1) for t in row.values()))):
        own_state = None if fresh else Mamba3Memory(*(t[n : n + 1] for t in state))
        o, after = mamba3(*parts, initial_state=own_state, output_final_state=True)
        outputs.append(o)
        states.append(after)
    separate = torch.cat(outputs, dim=1), tuple(torch.cat(t) for t in zip(*states))
    for a, b in zip((packed[0], *packed[1]), (separate[0], *separate[1]), strict=True):
        assert relative(a, b) < EXACT
    for a, b in zip(gradients(packed, leaves), gradients(separate, leaves)):
        assert relative(a, b) < EXACT


def test_low_precision_inputs_keep_a_float32_state(x):
    narrow = [x[n].detach().bfloat16() for n in NAMES[:3]] + [x[n].detach().float() for n in NAMES[3:6]]
    o, state = mamba3(*narrow, output_final_state=True)
    assert (o.dtype, state.key.dtype, state.memory.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact, _ = mamba3(*(t.double() for t in narrow))
    assert relative(o, exact) < 0.01  # the output is rounded to 8 bits, 0.2 % on average


def test_autocast_leaves_the_state_and_the_sums_in_float32(x):
    args = [x[n].detach().float() for n in NAMES[:6]]
    state = Mamba3Memory(*(x[n].detach().float() for n in NAMES[6:]))
    expected = mamba3(*args, initial_state=state, output_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = mamba3(*args, initial_state=state, output_final_state=True)
    for a, b in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)


def test_shapes_are_known_on_the_meta_device(x):
    o, state = mamba3(*(x[n].detach().to("meta") for n in NAMES[:6]), output_final_state=True)
    assert [t.shape for t in (o, *state)] == [x[n].shape for n in ("v", "memory", "key", "value")]


def test_no_state_unless_asked_for(x):
    assert mamba3(*(x[n] for n in NAMES[:6]))[1] is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda t: t[0, 0], r"k has shape .*; expected \[B, T, H, K\] or \[B, T, R, H, K\]"),
        ("q", lambda t: t[..., 1:], r"q has shape .*; expected that of k"),
        ("v", lambda t: t[:, 1:], r"v has shape \[2, 69, .*; expected \[2, 70, .*'V'\]"),
        ("dt", lambda t: t[..., None], r"dt has shape \[2, 70, 2, 1\]; expected \[2, 70, 2\], one per token and head"),
        ("key", lambda t: t[:1], r"the state's key has shape \[1, "),
        ("value", lambda t: t[..., 1:], r"the state's value has shape .*, 4\]; expected .*, 5\]"),
        ("memory", lambda t: t[:1], r"the state's memory has shape \[1, 2, 6, 5\]; expected \[2, 2, 6, 5\]"),
    ],
)
def test_what_does_not_fit_is_named(x, name, change, message):
    with pytest.raises(ValueError, match=message):
        rule(x | {name: change(x[name])})


@pytest.mark.parametrize(
    ("cu_seqlens", "rows", "message"),
    [
        ([0.0, 70.0], 1, r"cu_seqlens is torch.float32 of shape \[2\] with B = 1; expected int32 or int64"),
        ([0, 70], 2, r"cu_seqlens is torch.int64 of shape \[2\] with B = 2; expected .* B = 1"),
        ([0, 71], 1, r"cu_seqlens is \[0, 71\]; expected non-decreasing offsets from 0 to T = 70"),
    ],
)
def test_bad_offsets_are_named(x, cu_seqlens, rows, message):
    with pytest.raises(ValueError, match=message):
        mamba3(*(x[n][:rows] for n in NAMES[:6]), cu_seqlens=torch.tensor(cu_seqlens))


def test_rule_takes_the_options_of_every_rule():
    of = lambda f: {p.name for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY}  # noqa: E731
    assert of(mamba3) == of(gated_delta_rule_2)
