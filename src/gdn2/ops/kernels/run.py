"""Launching a kernel without Triton's study of every argument, which costs up to 0.1 ms a call."""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRET = triton.knobs.runtime.interpret

PLAIN = (Tensor, torch.nn.Parameter)

_compiled: dict[tuple[Any, ...], Any] = {}


def run(
    kernel: Any, programs: int, args: tuple[Any, ...], constants: tuple[Any, ...], warps: int = 4, stages: int = 1,
    early: bool = False,
) -> None:  # fmt: skip
    """Launch `kernel` on `programs` programs with its run-time arguments and then its compile-time ones.

    A kernel that is compiled already for these constants, types, alignments and kinds of integers is launched directly.
    early: before the kernel that was launched last is complete, for which it waits itself; see `early.py`.
    TypeError for a tensor whose memory is not simply its own: a collective's that is under way, a DTensor.
    """
    if programs == 0:
        return
    if INTERPRET:
        for x in args:
            _kind(x)
        kernel[(programs,)](*args, *constants)
        return
    device = next(x for x in args if isinstance(x, Tensor)).device
    key = (kernel.fn, device, tuple(_kind(x) for x in args), constants, warps, stages, early)
    with torch.cuda.device(device):
        if key in _compiled:
            _compiled[key][(programs, 1, 1)](*args, *constants)
        else:
            options = {"launch_pdl": True} if early else {}  # other GPUs' compilers do not know the word
            _compiled[key] = kernel[(programs,)](*args, *constants, num_warps=warps, num_stages=stages, **options)


def _kind(x: Any) -> Any:
    """What Triton compiles anew for."""
    if isinstance(x, TensorDescriptor):
        return *_kind(x.base), *x.block_shape
    if isinstance(x, Tensor):
        # A subclass that takes its operations over has its numbers elsewhere; any other is a tensor by another name.
        if type(x) not in PLAIN and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(f"a kernel was given a {type(x).__name__}; expected a torch.Tensor")
        return x.dtype, x.data_ptr() % 16 == 0
    return (x == 1, x % 16 == 0, x.bit_length() > 31) if isinstance(x, int) else type(x)
