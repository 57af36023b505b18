"""What the decays of all recurrent mixers share: parameters kept in float32, and how they start."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gdn2.layers.linear import at_least_float32


class Float32Parameters(nn.Module):
    """A module whose parameters named in `float32_parameters` stay float32 through `.to(bfloat16)` and `.half()`.

    They take no weight decay: they carry the attribute `no_weight_decay`. A subclass makes them, then calls `_mark`.
    """

    float32_parameters: tuple[str, ...] = ()

    def _mark(self) -> None:
        for name in self.float32_parameters:
            getattr(self, name).no_weight_decay = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Module.to, .cuda, .to_empty ... all come through here; `fn` is handed one parameter or gradient at a time.

        A cast of a float32 parameter to a narrower type is replaced by a move, so that its bits survive; afterwards the
        marks are put back, since leaving the meta device makes new Parameters.
        """
        named = [getattr(self, name) for name in self.float32_parameters]
        kept = {id(t) for p in named for t in (p, p.grad) if t is not None}

        def keep_float32(t: Tensor) -> Tensor:
            out = fn(t)
            if id(t) in kept and out.dtype != at_least_float32(out).dtype:
                return t.to(out.device, torch.float32)
            return out

        super()._apply(keep_float32, recurse)
        self._mark()
        return self


@torch.no_grad()
def init_rate(rate: Tensor) -> None:
    """Fill with log U(1, 16)."""
    nn.init.uniform_(rate, 1, 16).log_()


@torch.no_grad()
def init_step(delta: Tensor) -> None:
    """Fill with the inverse softplus of dt, log-uniform in [1e-3, 1e-1].

    (The papers then floor dt at 1e-4, which no draw can reach.)
    """
    nn.init.uniform_(delta, math.log(1e-3), math.log(1e-1)).exp_()
    delta.add_(torch.log(-torch.expm1(-delta)))
