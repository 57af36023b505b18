"""Inputs of the operator for tests, drawn in float64 so that one draw serves every dtype."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

DECAYS = {
    "layer": lambda *s: -torch.rand(*s, dtype=torch.float64) * 1.6,  # the range of the layer's initialisation
    "none": lambda *s: torch.zeros(*s, dtype=torch.float64),
    "-5": lambda *s: torch.full(s, -5.0, dtype=torch.float64),  # strong chunks whose blocks of a few tokens are not
    "-25": lambda *s: torch.full(s, -25.0, dtype=torch.float64),
    "-90": lambda *s: torch.full(s, -90.0, dtype=torch.float64),
    "-1e4": lambda *s: torch.full(s, -1e4, dtype=torch.float64),
    "mixed": lambda *s: torch.tensor([0, -1e-3, -1, -25, -90, -1e4], dtype=torch.float64)[torch.randint(0, 6, s)],
    "-inf": lambda *s: torch.where(torch.rand(*s) < 0.1, -torch.inf, -torch.rand(*s, dtype=torch.float64)),
}


@dataclass
class Operands:
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    erase: Tensor | None
    write: Tensor | None
    initial_state: Tensor | None

    def to(self, dtype: torch.dtype, grad: bool = True) -> "Operands":
        """A copy whose tensors are leaves of `dtype`."""
        copies = [getattr(self, f.name) for f in fields(self)]
        return Operands(*(x if x is None else x.detach().to(dtype).requires_grad_(grad) for x in copies))

    def tensors(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in named.items() if x is not None}

    def call(self, rule, **options):
        tensors = [self.q, self.k, self.v, self.log_decay, self.erase, self.write]
        return rule(*tensors, initial_state=self.initial_state, output_final_state=True, **options)


def draw(B=2, T=70, H=2, HV=None, K=12, V=20, N=None, decay="layer", seed=0) -> Operands:
    torch.manual_seed(seed)
    HV = HV or H
    normal = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
    uniform = lambda *s: torch.rand(*s, dtype=torch.float64)  # noqa: E731
    return Operands(
        q=normal(B, T, H, K),
        k=torch.nn.functional.normalize(normal(B, T, H, K), dim=-1),
        v=normal(B, T, HV, V),
        log_decay=DECAYS[decay](B, T, H, K),
        erase=uniform(B, T, H, K),
        write=uniform(B, T, HV, V),
        initial_state=normal(N or B, HV, K, V),
    )


def relative(a: Tensor, b: Tensor) -> float:
    """L2 distance of a from b, relative to b; inf when a is not finite, so that a NaN never passes a bound."""
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def results(operands: Operands, rule, upstream_seed=1, **options) -> dict[str, Tensor]:
    """Output, final state and the gradient of every operand, for one fixed random upstream gradient of both results."""
    o, state = operands.call(rule, **options)
    generator = torch.Generator().manual_seed(upstream_seed)
    weight = lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)  # noqa: E731
    loss = (o * weight(o)).sum() + (state * weight(state)).sum()
    tensors = operands.tensors()
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    return {"o": o, "state": state} | {f"d {name}": g for name, g in zip(tensors, gradients)}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    errors = {name: relative(got[name], expected[name]) for name in expected}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= bound}
    assert not wrong, f"relative L2 error above {bound}: {wrong}"
