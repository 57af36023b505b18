"""Programmatic dependent launch: a kernel begins while the one before it ends, and waits only for its results.

A kernel that is launched so reads nothing before `wait_for_inputs` that the kernel before it may write, and writes
nothing before it. It lets the next one begin only then, so that all kernels before but that one are complete and
seen: weights and states that this one does not write may be read ahead. A CUDA graph keeps this.
"""

# mypy: disable-error-code="no-untyped-def"

from functools import lru_cache

import torch
import triton
import triton.language as tl

from gdn2.ops.kernels.run import INTERPRET

ALLOWED = True


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Wait until the kernel before is complete, and let the next begin to be launched."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def begin_early(device: torch.device) -> bool:
    """Whether kernels on this device are launched so: NVIDIA's from compute capability 9.0 on can be."""
    return ALLOWED and not INTERPRET and _supported(device)


@lru_cache(maxsize=16)
def _supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
