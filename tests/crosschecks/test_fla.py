"""The rules beside the naive functions of flash-linear-attention; skipped where fla-core and einops are not installed.

    pip install --no-deps fla-core==0.6.0 && pip install einops

Only the files named here are loaded, each by itself. They compute in float32 whatever they are given.
"""

import importlib.metadata
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from operands import relative
from torch import Tensor

from gdn2.ops import delta_rule, gated_delta_rule, kda, mamba2

pytest.importorskip("einops")
# Float32 on both sides, sums over up to 128 tokens in other orders. Measured: outputs 4e-7, gradients up to 1.5e-6.
BOUND = 1e-5
B, T, H, K, V = 2, 128, 2, 16, 24


def naive(rule: str):
    try:
        path = importlib.metadata.distribution("fla-core").locate_file(f"fla/ops/{rule}/naive.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fla-core is not installed")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{rule}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def x() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {
        "q": torch.randn(B, T, H, K), "k": F.normalize(torch.randn(B, T, H, K), dim=-1), "v": torch.randn(B, T, H, V),
        "channel": -torch.rand(B, T, H, K), "head": -torch.rand(B, T, H), "beta": torch.rand(B, T, H),
        "state": torch.randn(B, H, K, V),
    }  # fmt: skip
    return {name: t.requires_grad_() for name, t in tensors.items()}


def by_head(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def theirs_kda(form, x):
    f = getattr(naive("kda"), f"naive_{form}_kda")
    return f(x["q"], x["k"], x["v"], x["channel"], x["beta"], initial_state=x["state"], output_final_state=True)


def theirs_gdn(form, x):
    f = getattr(naive("gated_delta_rule"), f"naive_{form}_gated_delta_rule")
    named = {"q": x["q"], "k": x["k"], "v": x["v"], "g": x["head"], "beta": x["beta"]}
    return f(**named, initial_state=x["state"], output_final_state=True)


def theirs_delta(form, x):
    # The chunkwise form has no start state.
    module, tensors = naive("delta_rule"), by_head(x["q"], x["k"], x["v"], x["beta"])
    if form == "chunk":
        o, state = module.delta_rule_chunkwise(*tensors)
    else:
        o, state = module.delta_rule_recurrence(*tensors, initial_state=x["state"])
    return o.transpose(1, 2), state


def theirs_mamba2(form, x):
    """Mamba-2 is gated linear attention of q = C, k = B, v = dt x, with a scalar decay and no scale."""
    f = getattr(naive("simple_gla"), f"naive_{form}_simple_gla")
    v = x["v"] * x["beta"].unsqueeze(-1)
    return f(x["q"], x["k"], v, x["head"], scale=1.0, initial_state=x["state"], output_final_state=True)


def ours(rule, x, form):
    options = {"output_final_state": True}
    if rule is not delta_rule or form != "chunk":
        options["initial_state"] = x["state"]
    decay = {kda: [x["channel"]], delta_rule: []}.get(rule, [x["head"]])
    return rule(x["q"], x["k"], x["v"], *decay, x["beta"], **options)


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [(kda, theirs_kda), (gated_delta_rule, theirs_gdn), (delta_rule, theirs_delta), (mamba2, theirs_mamba2)],
    ids=lambda f: f.__name__,
)
def test_rule_agrees_with_fla(rule, theirs, form: str, x: dict[str, Tensor]) -> None:
    got, other = ours(rule, x, form), theirs(form, x)
    weights = [torch.randn_like(t) for t in got]
    leaves = list(x.values())
    gradients = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(r, weights)), leaves, allow_unused=True)
        for r in (got, other)
    ]
    for a, b in zip(got, other, strict=True):
        assert relative(a, b) < BOUND
    for name, a, b in zip(x, *gradients):
        assert (a is None) == (b is None), name
        assert a is None or relative(a, b) < BOUND, name
