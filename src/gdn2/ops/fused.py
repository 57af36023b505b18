"""Where the operations around the operator run as fused Triton kernels: on CUDA tensors of at most 32 bits.

Everywhere else, and without triton, they are torch operations with the same results to rounding.
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICES = ("cuda",) if importlib.util.find_spec("triton") else ()

_log = logging.getLogger("gdn2")
_announced = False
_planning = False


@contextmanager
def planning() -> Iterator[None]:
    """Within this context CPU tensors take the path of a GPU: for fake tensors, on which no kernel ever runs."""
    global _planning
    before, _planning = _planning, bool(DEVICES)
    try:
        yield
    finally:
        _planning = before


def is_planning() -> bool:
    return _planning


def fused(x: Tensor) -> bool:
    """Whether operations on x run as fused kernels. The first time they do is logged."""
    global _announced
    chosen = (x.device.type in DEVICES or _planning) and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if chosen and not _planning and not _announced and not torch.compiler.is_compiling():
        _announced = True
        _log.info(f"convolutions and norms on {x.device.type}: fused kernels")
    return chosen
