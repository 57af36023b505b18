"""How far a device's results are from those in float64."""

import torch
from torch import Tensor


def relative(a: Tensor, b: Tensor, heads: int | None = None) -> float:
    """L2 distance of a from b relative to b, with `heads` the largest of any index on that axis; inf for NaN."""
    a, b = a.detach().double().cpu(), b.detach().double()
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    if heads is None or heads >= a.dim():
        return float((a - b).norm() / b.norm().clamp(min=1e-30))
    rest = [n for n in range(a.dim()) if n != heads]
    error, norm = (torch.linalg.vector_norm(x, dim=rest) for x in (a - b, b))
    return float((error / norm.clamp(min=float(norm.max()) / 10 + 1e-30)).max())  # small ones are others' rounding


def with_gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, and as "d NAME" the gradients of the leaves under fixed random gradients of the outputs."""
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    return outputs | {f"d {name}": g for name, g in zip(leaves, gradients)}


def worst(errors: dict[str, float]) -> tuple[float, float, str]:
    """Of errors by name, of which "d ..." are gradients: the worst of outputs, of gradients, and that one's name."""
    gradients = {name: error for name, error in errors.items() if name.startswith("d ")}
    outputs = [error for name, error in errors.items() if name not in gradients]
    name = max(gradients, key=lambda name: gradients[name], default="")
    return max(outputs), gradients.get(name, 0.0), name
