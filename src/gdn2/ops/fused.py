"""Where the operations around the operator run as fused Triton kernels: on CUDA tensors of at most 32 bits.

Everywhere else, and without triton, they are torch operations with the same results to rounding.
"""

import importlib.util
import logging

import torch
from torch import Tensor

DEVICES = ("cuda",) if importlib.util.find_spec("triton") else ()

_log = logging.getLogger("gdn2")
_announced = False


def fused(x: Tensor) -> bool:
    """Whether operations on x run as fused kernels. The first time they do is logged."""
    global _announced
    chosen = x.device.type in DEVICES and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if chosen and not _announced and not torch.compiler.is_compiling():
        _announced = True
        _log.info(f"convolutions and norms on {x.device.type}: fused kernels")
    return chosen
