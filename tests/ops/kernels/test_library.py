"""The kernels as a torch.library op: it compiles as one node and keeps the rules that torch checks."""

import pytest
import torch
from operands import assert_close, draw, results

from gdn2.ops import api, gated_delta_rule_2
from gdn2.ops.kernels import launch, library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(**options):
    x = draw(B=1, T=20, H=1, K=16, V=16, **options).to(torch.float32)
    for name, tensor in x.tensors().items():
        setattr(x, name, tensor.detach().to(DEVICE).requires_grad_())
    return x


def arguments(x, cu_seqlens=None, save=True, projected=False, final=True):
    gates = x.log_decay, x.erase, x.write
    rate, delta = (torch.ones(n, device=DEVICE, requires_grad=True) if projected else None for n in (1, 16))
    return x.q, x.k, x.v, *gates, x.initial_state, rate, delta, cu_seqlens, 0.5, 2.0, 1.0, projected, save, final


@pytest.mark.parametrize(
    ("missing", "projected"),
    [((), False), (("erase",), False), (("log_decay", "erase", "write", "initial_state"), False), ((), True)],
)
def test_opcheck_passes(missing, projected):
    x = operands()
    for name in missing:
        setattr(x, name, None)
    torch.library.opcheck(library.forward.library, arguments(x, projected=projected))


def test_fake_knows_the_shapes_of_packed_sequences():
    x = operands(N=3)
    cu_seqlens = torch.tensor([0, 3, 3, 20], device=DEVICE)
    o, state, kept = library.forward(*arguments(x, cu_seqlens))
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = library.forward(*arguments(x, cu_seqlens))
    describe = lambda tensors: [(t.shape, t.dtype) for t in tensors]  # noqa: E731
    assert describe([*fake[:2], *fake[2]]) == describe([o, state, *kept])
    assert len(kept) == len(launch.Residuals._fields)


def test_an_unwanted_state_and_unused_residuals_cost_nothing():
    x = operands()
    o, state = library.rule(*arguments(x, final=False))
    assert state.numel() == 0
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        torch.autograd.grad(o, [x.q], torch.ones_like(o))
    assert not [name for name in seen if "zeros" in name]


def test_plain_tensors_give_what_the_library_gives():
    x = operands()
    inputs = arguments(x, projected=True)
    leaves = [t for t in inputs[:9] if t is not None]
    results = []
    for call in (library.forward.library, library.rule):
        o, state = call(*inputs)[:2]
        results.append(
            [o, state, *torch.autograd.grad([o, state], leaves, [torch.ones_like(o), torch.ones_like(state)])]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    o, _ = library.rule(*inputs)
    (once,) = torch.autograd.grad(o.sum(), [x.q], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(once.sum(), [x.q])


def test_a_gradient_of_the_state_alone_passes():
    x = operands()
    _, state = library.rule(*arguments(x))
    _, expected = library.forward(*arguments(x))[:2]
    assert torch.equal(*(torch.autograd.grad(s.sum(), [x.k])[0] for s in (state, expected)))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_whole_matches_eager(packed):
    options = {"cu_seqlens": torch.tensor([0, 3, 3, 20], device=DEVICE)} if packed else {}
    x = operands(N=3 if packed else None)
    compiled = torch.compile(gated_delta_rule_2, fullgraph=True, backend="aot_eager")
    eager = results(x, gated_delta_rule_2, backend="triton", **options)
    # The same kernels run in the same order; only the graph around them differs.
    assert_close(results(x, compiled, backend="triton", **options), eager, 0)


def test_one_token_without_gradient_matches_the_recurrence():
    x = draw(B=2, T=1, H=1, HV=2, K=12, V=20).to(torch.float32, grad=False)
    with torch.no_grad():
        o, state = x.call(gated_delta_rule_2, backend="reference")
        for name, tensor in x.tensors().items():
            setattr(x, name, tensor.to(DEVICE))
        before = x.initial_state.clone()
        o_, state_ = x.call(gated_delta_rule_2, backend="triton")
    assert_close({"o": o_.cpu(), "state": state_.cpu()}, {"o": o, "state": state}, 5e-6)  # float32 rounding, twice
    assert torch.equal(x.initial_state, before)


def test_what_the_kernels_cannot_do_is_an_error_and_auto_does_it_otherwise(monkeypatch):
    x = draw(B=1, T=2, H=1, K=16, V=16)
    refused = "backend is 'triton', whose kernels "
    with pytest.raises(ValueError, match=refused + "take bfloat16, float16 and float32, and v has dtype torch.float64"):
        x.call(gated_delta_rule_2, backend="triton")
    wide = draw(B=1, T=2, H=1, K=257, V=16).to(torch.float32)
    with pytest.raises(ValueError, match=refused + "take head sizes up to 256, and here K = 257, V = 16"):
        wide.call(gated_delta_rule_2, backend="triton")
    monkeypatch.setattr(library, "INTERPRET", False)
    with pytest.raises(ValueError, match=refused + "need CUDA tensors, and v is on cpu; expected 'auto' or 'torch'"):
        x.to(torch.float32).call(gated_delta_rule_2, backend="triton")
    monkeypatch.setattr(api, "TRITON", False)
    with pytest.raises(ValueError, match=refused + "need the package triton, which is not installed"):
        x.to(torch.float32).call(gated_delta_rule_2, backend="triton")
    assert x.call(gated_delta_rule_2)[0].shape == x.v.shape
