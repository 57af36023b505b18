"""Programmatic dependent launch: a kernel begins while the one before it ends, and waits only for its results.

A kernel that is launched so writes nothing before `wait_for_inputs`, and reads nothing before it that another such
kernel may still be writing. What it does read ahead: weights, which none of them writes, and states that were last
written a step ago. Every step begins with a kernel that is launched in the ordinary way, the lookup of the embedding,
and so after all of the step before. A CUDA graph keeps this.
"""

# mypy: disable-error-code="no-untyped-def"

from functools import lru_cache

import torch
import triton
import triton.language as tl

from gdn2.ops.kernels.run import INTERPRET

NEXT = 1  # the next kernel may begin once all programs of this one have done their waiting; 0: when it has ended


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Wait until the kernel before is complete, and let the next begin: see NEXT."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def begin_early(device: torch.device) -> int:
    """NEXT, or 0 where kernels cannot be launched so: NVIDIA's can from compute capability 9.0 on."""
    return NEXT if not INTERPRET and _supported(device) else 0


@lru_cache(maxsize=16)
def _supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
