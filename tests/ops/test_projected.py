"""Activations outside the kernels: what `rule_from_projections` hands to the operator, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from gdn2.ops import gated_delta_rule_2, rule_from_projections


def draw(B=2, T=7, H=2, HV=4, K=3, V=5):
    torch.manual_seed(0)
    normal = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
    return (
        normal(B, T, H, K), normal(B, T, H, K), normal(B, T, HV, V), normal(B, T, H, K), normal(B, T, H, K),
        normal(B, T, HV, V), normal(H), normal(H * K),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_projections_are_activated_as_the_paper_says(backend):
    q, k, v, f, b, w, rate, delta = draw()
    o, state = rule_from_projections(
        q, k, v, f, b, w, rate, delta, largest_erase=2.0, output_final_state=True, backend=backend
    )
    unit = lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    g = -rate.exp()[:, None] * F.softplus(f + delta.view(2, 3))
    expected = gated_delta_rule_2(
        unit(q), unit(k), v, g, 2 / (1 + (-b).exp()), 1 / (1 + (-w).exp()), output_final_state=True,
        backend="reference",
    )  # fmt: skip
    for got, exact in zip((o, state), expected):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)  # float64, reordered sums


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (6, torch.zeros(3), r"rate has shape \[3\]; expected \[2\]"),
        (6, None, r"rate has shape None; expected \[2\]"),
        (7, torch.zeros(2), r"delta has shape \[2\]; expected \[6\]"),
        (3, None, r"rate has shape \[2\]; expected None"),
        (
            4,
            torch.zeros(2, 7, 2, 2, dtype=torch.float64),
            r"erase has shape \[2, 7, 2, 2\]; expected \[2, 7, 2, 3 or 1\]",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused(index, value, message):
    arguments = list(draw())
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        rule_from_projections(*arguments)
