"""Each rule against its own recurrence, written here from its own paper's form and independent of the operator."""

import inspect

import pytest
import torch
from operands import relative

from gdn2.ops import delta_rule, gated_delta_rule, gated_delta_rule_2, kda, mamba2, reference

B, T, H, K, V = 2, 70, 2, 8, 12
# float64 on both sides; only the order of sums differs.
EXACT = 1e-13


@pytest.fixture(params=[1, 3], ids=["plain", "grouped"])
def x(request):
    torch.manual_seed(0)
    HV = H * request.param
    uniform = lambda *s: torch.rand(*s, dtype=torch.float64).requires_grad_()  # noqa: E731
    normal = lambda *s: torch.randn(*s, dtype=torch.float64).requires_grad_()  # noqa: E731
    k = torch.nn.functional.normalize(normal(B, T, H, K), dim=-1).detach().requires_grad_()
    return {
        "q": normal(B, T, H, K), "k": k,
        "v": normal(B, T, HV, V), "channel": uniform(B, T, H, K), "head": uniform(B, T, H), "beta": uniform(B, T, HV),
        "state": normal(B, HV, K, V),
    }  # fmt: skip


def each_step(x, update, scale):
    """o_t = S_t^T (scale q_t) with S_t = update(S_{t-1}, k_t, t); q and k repeated over the group of value heads."""
    G = x["v"].shape[2] // H
    q, k = (x[n].repeat_interleave(G, dim=2) for n in "qk")
    S, out = x["state"], []
    for t in range(T):
        S = update(S, k[:, t], t)
        out.append((S * (scale * q[:, t]).unsqueeze(-1)).sum(-2))
    return torch.stack(out, 1), S


def outer(a, b):
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def householder(k, beta):
    """I - beta k k^T, one per value head."""
    return torch.eye(K, dtype=k.dtype) - beta[..., None, None] * outer(k, k)


def grouped(x, name):
    return x[name].repeat_interleave(x["v"].shape[2] // H, dim=2)


def gated_delta_2(x):
    b, w = grouped(x, "channel").sin().abs(), x["v"].detach().sigmoid()
    g = -grouped(x, "channel")

    def update(S, k, t):
        transition = torch.eye(K, dtype=k.dtype) - outer(k, b[:, t] * k)
        return transition @ (g[:, t].exp().unsqueeze(-1) * S) + outer(k, w[:, t] * x["v"][:, t])

    rule = gated_delta_rule_2(
        x["q"], x["k"], x["v"], -x["channel"], x["channel"].sin().abs(), w,
        initial_state=x["state"], output_final_state=True,
    )  # fmt: skip
    return rule, each_step(x, update, K**-0.5)


def kimi(x):
    g = -grouped(x, "channel")

    def update(S, k, t):
        decayed = g[:, t].exp().unsqueeze(-1) * S
        return householder(k, x["beta"][:, t]) @ decayed + outer(k, x["beta"][:, t].unsqueeze(-1) * x["v"][:, t])

    rule = kda(x["q"], x["k"], x["v"], -x["channel"], x["beta"], initial_state=x["state"], output_final_state=True)
    return rule, each_step(x, update, K**-0.5)


def gated_delta(x):
    alpha = (-grouped(x, "head")).exp()

    def update(S, k, t):
        kept = alpha[:, t, :, None, None] * (householder(k, x["beta"][:, t]) @ S)
        return kept + x["beta"][:, t, :, None, None] * outer(k, x["v"][:, t])

    rule = gated_delta_rule(
        x["q"], x["k"], x["v"], -x["head"], x["beta"], initial_state=x["state"], output_final_state=True
    )
    return rule, each_step(x, update, K**-0.5)


def delta(x):
    def update(S, k, t):
        error = x["v"][:, t] - (S * k.unsqueeze(-1)).sum(-2)
        return S + outer(k, x["beta"][:, t].unsqueeze(-1) * error)

    rule = delta_rule(x["q"], x["k"], x["v"], x["beta"], initial_state=x["state"], output_final_state=True)
    return rule, each_step(x, update, K**-0.5)


def ssd(x):
    a = (-grouped(x, "head")).exp()

    def update(S, k, t):
        return a[:, t, :, None, None] * S + outer(k, x["beta"][:, t].unsqueeze(-1) * x["v"][:, t])

    rule = mamba2(x["q"], x["k"], x["v"], -x["head"], x["beta"], initial_state=x["state"], output_final_state=True)
    return rule, each_step(x, update, 1.0)


RULES = [gated_delta_2, kimi, gated_delta, delta, ssd]


@pytest.mark.parametrize("rule", RULES)
def test_rule_matches_its_own_recurrence(rule, x):
    (o, state), (o_own, state_own) = rule(x)
    assert relative(o, o_own) < EXACT
    assert relative(state, state_own) < EXACT


@pytest.mark.parametrize("rule", RULES)
def test_gradients_match_those_of_its_own_recurrence(rule, x):
    (o, state), (o_own, state_own) = rule(x)
    do, dS = torch.randn_like(o), torch.randn_like(state)
    leaves = list(x.values())
    got = torch.autograd.grad((o * do).sum() + (state * dS).sum(), leaves, allow_unused=True)
    own = torch.autograd.grad((o_own * do).sum() + (state_own * dS).sum(), leaves, allow_unused=True)
    for name, a, b in zip(x, got, own):
        assert (a is None) == (b is None), name
        assert a is None or relative(a, b) < EXACT, name


def test_tied_gates_reduce_to_kda_and_the_delta_rules(x):
    if x["v"].shape[2] != H:
        pytest.skip("one gate for erase and write needs as many value heads as key heads")
    q, k, v, decay, head = (x[n] for n in ("q", "k", "v", "channel", "head"))
    beta = x["beta"].unsqueeze(-1)
    tied = beta.expand(B, T, H, K), beta.expand(B, T, H, V)
    scalar = -x["head"].unsqueeze(-1).expand(B, T, H, K)
    cases = [
        (gated_delta_rule_2(q, k, v, -decay, *tied), kda(q, k, v, -decay, x["beta"])),
        (gated_delta_rule_2(q, k, v, scalar, *tied), gated_delta_rule(q, k, v, -head, x["beta"])),
        (gated_delta_rule_2(q, k, v, scalar * 0, *tied), delta_rule(q, k, v, x["beta"])),
    ]  # fmt: skip
    for (whole, _), (reduced, _) in cases:
        gate, gate_reduced = (torch.autograd.grad(o.square().sum(), x["beta"])[0] for o in (whole, reduced))
        assert relative(whole, reduced) < EXACT
        assert relative(gate, gate_reduced) < EXACT


def test_step_minimises_the_papers_objective():
    """S_t of (9) is the minimiser of ||S - Sbar||^2 - 2 <S^T k, z - Sbar^T e> (13): its gradient there is zero."""
    torch.manual_seed(0)
    normal = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
    q, k, v, S0 = normal(1, 1, 1, K), normal(1, 1, 1, K), normal(1, 1, 1, V), normal(1, 1, K, V)
    g, b, w = -torch.rand(1, 1, 1, K).double(), torch.rand(1, 1, 1, K).double(), torch.rand(1, 1, 1, V).double()
    _, S = reference.recurrence(q, k, v, g, b, w, 1.0, S0)
    S = S[0, 0].requires_grad_()
    Sbar = g[0, 0, 0].exp().unsqueeze(-1) * S0[0, 0]
    k1, e, z = k[0, 0, 0], (b * k)[0, 0, 0], (w * v)[0, 0, 0]
    objective = (S - Sbar).square().sum() - 2 * (S.T @ k1) @ (z - Sbar.T @ e)
    (gradient,) = torch.autograd.grad(objective, S)
    assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize("rule", [kda, gated_delta_rule, delta_rule])
def test_beta_of_the_wrong_shape_is_named(rule, x):
    beta = torch.rand(B, T, H + 1, dtype=torch.float64)
    decay = [] if rule is delta_rule else [-x["channel"] if rule is kda else -x["head"]]
    with pytest.raises(ValueError, match=r"beta has shape \[2, 70, 3\]; expected \[2, 70, \d\]"):
        rule(x["q"], x["k"], x["v"], *decay, beta)


def test_every_rule_takes_the_same_options():
    rules = (gated_delta_rule_2, kda, gated_delta_rule, delta_rule, mamba2)
    options = [{p.name for p in inspect.signature(r).parameters.values() if p.kind is p.KEYWORD_ONLY} for r in rules]
    assert all(o == {"scale", "initial_state", "output_final_state", "cu_seqlens", "backend"} for o in options)


def test_wrong_shapes_are_shown_as_they_were_given():
    grouped = torch.zeros(1, 2, 4, 5)
    narrow, three = torch.zeros(1, 2, 2, 6), torch.zeros(1, 2, 3, 6)
    beta, flat = torch.zeros(1, 2, 4), torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"q has shape \[1, 2, 3, 6\]; expected \[1, 2, 2, 6\]"):
        kda(three, narrow, grouped, None, beta)
    with pytest.raises(ValueError, match=r"log_decay has shape \[1, 2, 3, 6\]; expected \[1, 2, 2, 6 or 1\]"):
        kda(narrow, narrow, grouped, three, beta)
    with pytest.raises(ValueError, match=r"k has shape \[2, 6\]; expected 4 axes"):
        gated_delta_rule(narrow, flat, grouped, narrow[..., 0], beta)
    with pytest.raises(ValueError, match=r"k has shape \[2, 6\]; expected 4 axes"):
        mamba2(narrow, flat, grouped, narrow[..., 0], beta)
    with pytest.raises(ValueError, match=r"beta has dtype torch.int64; expected float64"):
        delta_rule(narrow, narrow, grouped, beta.long())
