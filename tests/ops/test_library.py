"""The operator as a torch.library op: it compiles as one node and keeps the rules that torch checks."""

import pytest
import torch
from operands import assert_close, draw, results

from gdn2.ops import gated_delta_rule_2, library

CASES = {
    "dense": (draw(T=70), None),
    "ragged packed": (draw(B=1, T=70, HV=4, N=3), [0, 3, 3, 70]),
    "no erase": (draw(T=5), None),
    "no gates, no state": (draw(T=9), None),
}
CASES["no erase"][0].erase = None
for _name in ("log_decay", "erase", "write", "initial_state"):
    setattr(CASES["no gates, no state"][0], _name, None)


@pytest.mark.parametrize("case", CASES)
def test_opcheck_passes(case):
    operands, bounds = CASES[case]
    x = operands.to(torch.float64)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    arguments = (x.q, x.k, x.v, x.log_decay, x.erase, x.write, x.initial_state, cu_seqlens, 0.5, True)
    torch.library.opcheck(library.chunk, arguments)


@pytest.mark.parametrize("T", [1, 5])
def test_opcheck_passes_without_gradients_for_a_state_of_any_strides(T):
    x = draw(T=T, K=3, V=5).to(torch.float64, grad=False)
    state = x.initial_state.mT.contiguous().mT
    arguments = (x.q, x.k, x.v, x.log_decay, x.erase, x.write, state, None, 0.5, False)
    torch.library.opcheck(library.chunk, arguments)


@pytest.mark.parametrize("case", CASES)
def test_compiled_whole_matches_eager(case):
    operands, bounds = CASES[case]
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    compiled = torch.compile(gated_delta_rule_2, fullgraph=True, backend="aot_eager")
    eager = results(operands.to(torch.float64), gated_delta_rule_2, **options)
    # The same kernels run in the same order; only the graph around them differs.
    assert_close(results(operands.to(torch.float64), compiled, **options), eager, 0)


def test_inference_saves_nothing_for_a_backward():
    with torch.no_grad():
        x = draw().to(torch.float32)
        _, _, *saved = library.chunk(x.q, x.k, x.v, x.log_decay, x.erase, x.write, None, None, 1.0, False)
    assert [s.numel() for s in saved] == [0, 0, 0]


def test_outputs_carry_gradients_for_any_single_input():
    names = ("q", "k", "v", "log_decay", "erase", "write", "initial_state")
    for name in names:
        x = draw(T=3).to(torch.float32, grad=False)
        getattr(x, name).requires_grad_()
        o, state = x.call(gated_delta_rule_2)
        assert o.requires_grad
        (gradient,) = torch.autograd.grad(o.sum() + state.sum(), getattr(x, name))
        assert gradient.shape == getattr(x, name).shape
        assert bool(gradient.any())


def test_autocast_changes_nothing():
    operands = draw(T=70).to(torch.float32)
    plain = results(operands, gated_delta_rule_2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(results(operands, gated_delta_rule_2), plain, 0)
        o, state = operands.call(gated_delta_rule_2, backend="reference")
    # The reference's own gradients are torch's, which autocast rounds when backward runs inside it.
    assert_close({"o": o, "state": state}, {"o": plain["o"], "state": plain["state"]}, 1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # what torch.func.jvp imports
def test_tangents_are_refused_but_by_the_reference():
    x = draw(B=1, T=5).to(torch.float64, grad=False)
    others = x.k, x.v, x.log_decay, x.erase, x.write
    rule = lambda backend: lambda q: gated_delta_rule_2(q, *others, backend=backend)[0]  # noqa: E731
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(rule("torch"), (x.q,), (x.q,))
    o, tangent = torch.func.jvp(rule("reference"), (x.q,), (x.q,))
    torch.testing.assert_close(tangent, o)  # linear in q
