"""Several Linears of one input as a single product: decoding reads few large matrices faster than many small ones."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packed:
    """One matrix that holds the weights of several Linears without biases, whose parameters become views of its rows.

    `matrix` [sum of sizes, in] is that. So nothing is held twice, and changes of a weight in place are seen. A Linear
    that is given another tensor, by a move or a cast, or whose place another module takes, ends it: see `holds`.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._linears, self.sizes = linears, [linear.out_features for linear in linears]
        self.matrix = torch.cat([linear.weight for linear in linears])
        self._views = self.matrix.split(self.sizes)
        for linear, rows in zip(linears, self._views):
            linear.weight.data = rows

    @staticmethod
    def possible(modules: Sequence[nn.Module]) -> bool:
        """Whether all are Linears of one dtype, device and input, without biases, whose weights are their own."""
        linears = [m for m in modules if isinstance(m, nn.Linear) and m.bias is None]
        alike = {(m.in_features, m.weight.dtype, m.weight.device) for m in linears}
        return len(linears) == len(modules) and len(alike) == 1

    @classmethod
    def of(cls, modules: Sequence[nn.Module], before: "Packed | None") -> "Packed | None":
        """These Linears packed, or as they were `before` while that holds: a CUDA graph may be reading it."""
        if before is not None and before.holds(modules):
            return before
        return cls([m for m in modules if isinstance(m, nn.Linear)]) if cls.possible(modules) else None

    def holds(self, modules: Sequence[nn.Module]) -> bool:
        """Whether `matrix` is the weights of these modules."""
        same = len(modules) == len(self._linears) and all(a is b for a, b in zip(modules, self._linears))
        return same and all(
            linear.weight.data_ptr() == rows.data_ptr() for linear, rows in zip(self._linears, self._views)
        )

    def product(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., sum of sizes], the Linears' outputs beside each other."""
        return F.linear(x, self.matrix)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., in] -> the output of each Linear, views of one tensor."""
        return self.product(x).split(self.sizes, dim=-1)
