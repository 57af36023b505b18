"""Linear layers with the paper's initialisation."""

import torch
from torch import nn


class Linear(nn.Linear):
    """nn.Linear that starts Xavier-uniform with gain 2^-2.5 and, where it has one, a bias of zero."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=2**-2.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def low_rank(d_in: int, rank: int, d_out: int, bias: bool = False) -> nn.Sequential:
    """d_in -> rank -> d_out without a nonlinearity; `bias` is the second Linear's."""
    return nn.Sequential(Linear(d_in, rank, bias=False), Linear(rank, d_out, bias=bias))


def check_sizes(**sizes: int) -> None:
    """ValueError naming the first that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; expected at least 1")


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
