"""The channel mixer."""

import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.few import few
from gdn2.layers.linear import Linear
from gdn2.layers.norm import RMSNorm
from gdn2.layers.packed import Packed
from gdn2.ops.fused import fused


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)); x [..., d_model], `width` hidden channels, no biases."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate = Linear(d_model, width, bias=False)
        self.up = Linear(d_model, width, bias=False)
        self.down = Linear(width, d_model, bias=False)
        self._packed: Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        if fused(gate):
            from gdn2.ops.kernels.swiglu import swiglu

            return self.down(swiglu(gate, up))
        return self.down(F.silu(gate) * up)

    def pack(self) -> None:
        """Put gate and up side by side for `step`, where they can be and are not yet."""
        self._packed = Packed.of(self._reads(), self._packed)

    def step(self, x: Tensor) -> Tensor:
        """`forward` without gradients, in fewer operations once packed."""
        if self._packed is None or not self._packed.holds(self._reads()) or not fused(x):
            return self(x)
        from gdn2.ops.kernels.swiglu import swiglu_of_pair

        y: Tensor = self.down(swiglu_of_pair(self._packed.product(x)))
        return y

    def few(self, x: Tensor) -> bool:
        """Whether `step_sum` can take x: few rows, on a GPU, after `pack`."""
        return self._packed is not None and self._packed.holds(self._reads()) and few(x, self.gate, self.down)

    def step_sum(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + step(norm(x)), in two kernels; for what is `few`."""
        from gdn2.ops.kernels.project import project

        assert self._packed is not None
        y = project(x, self._packed.matrix, norm=norm.weight, eps=norm.eps, swiglu=True)
        return project(y, self.down.weight, added=x)

    def _reads(self) -> list[nn.Module]:
        """What reads the input."""
        return [self.gate, self.up]
