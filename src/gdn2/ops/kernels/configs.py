"""Which tiles, warps and pipeline stages the kernels run with, by shared memory, operand and head size. No search.

The values for 227 KB of shared memory a program (H100, B200) were measured on an H100, those for 99 KB (A100,
A10, L4, RTX 30 to 50) follow by calculation: what Triton says each kernel takes when compiled for those. Every one is
checked by `gdn2 selftest`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gdn2.ops.kernels.run import INTERPRET

MAX_HEAD = 256
FEW = 64  # programs of a scan below which it takes narrower tiles, to keep more of the GPU busy
SEGMENTED = 16  # programs of a scan up to which long sequences are cut into segments
BUSY = 128  # programs of a scan over segments: one fills a multiprocessor's shared memory
SHORT = 16  # chunks that a segment has at least
H100_SHARED = 227 * 1024  # bytes of shared memory a program
LEAST_SHARED = 99 * 1024


@dataclass(frozen=True)
class Config:
    """Tokens per chunk, and for each kernel its channels per tile (BK, BV), warps and pipeline stages."""

    chunk: int
    prepare: tuple[int, int, int, int]
    strong_prepare: tuple[int, int, int, int]
    scan: tuple[int, int, int]  # BV, warps, stages; `scan_back` and the kernels for segments too
    narrow_scan: tuple[int, int, int]
    value: tuple[int, int, int]  # BV, warps, stages
    key: tuple[int, int, int, int]
    strong_key: tuple[int, int, int, int]


# By bytes of an operand: (largest padded head size, bytes of shared memory needed, configuration), first match.
CONFIGS = {
    2: (
        (128, H100_SHARED, Config(64, (64, 64, 4, 2), (64, 64, 4, 1), (64, 4, 3), (32, 4, 3), (64, 4, 1),
                                  (64, 64, 4, 1), (64, 64, 4, 1))),
        (128, LEAST_SHARED, Config(64, (64, 64, 4, 2), (64, 64, 4, 1), (64, 4, 2), (32, 4, 2), (64, 4, 1),
                                (64, 64, 4, 1), (64, 64, 4, 1))),
        (256, LEAST_SHARED, Config(32, (64, 64, 4, 1), (64, 64, 4, 1), (64, 4, 2), (64, 4, 2), (64, 4, 1),
                                (64, 64, 4, 1), (64, 64, 4, 1))),
    ),
    4: (
        (128, LEAST_SHARED, Config(32, (32, 32, 4, 1), (32, 32, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1),
                                (32, 32, 4, 1), (32, 32, 4, 1))),
        (256, H100_SHARED, Config(16, (32, 32, 4, 1), (32, 32, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1),
                                  (32, 32, 4, 1), (32, 32, 4, 1))),
        (256, LEAST_SHARED, Config(16, (32, 32, 4, 1), (32, 32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1),
                                (32, 32, 4, 1), (32, 32, 4, 1))),
    ),
}  # fmt: skip
INTERPRETED = Config(
    16, (16, 16, 1, 1), (16, 16, 1, 1), (16, 1, 1), (16, 1, 1), (16, 1, 1), (16, 16, 1, 1), (16, 16, 1, 1)
)


@torch.compiler.assume_constant_result
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program on this device may have; an H100's where there is no GPU."""
    if device.type != "cuda":
        return H100_SHARED
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def config_for(dtype: torch.dtype, K: int, V: int, shared: int = H100_SHARED) -> Config:
    """The configuration for tensors of this dtype and head sizes, on a GPU with so many bytes of shared memory.

    ValueError when the kernels have none.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"the Triton kernels take bfloat16, float16 or float32 tensors, not {dtype}")
    if not 1 <= min(K, V) <= max(K, V) <= MAX_HEAD:
        raise ValueError(f"the Triton kernels take head sizes from 1 to {MAX_HEAD}, not K = {K}, V = {V}")
    if INTERPRET:
        return INTERPRETED
    for bound, needed, config in CONFIGS[4 if dtype == torch.float32 else 2]:
        if max(K, V) <= bound and needed <= shared:
            return config
    raise ValueError(f"the Triton kernels need {LEAST_SHARED} bytes of shared memory a program; this GPU has {shared}")


class Shape(NamedTuple):
    """Compile-time sizes and types shared by the kernels, named as there, and the dtype of the scratch buffers."""

    H: int
    HV: int
    K: int
    V: int
    KP: int
    VP: int
    C: int
    LOG_C: int
    DT: tl.dtype
    PREC: str
    SOLVE: str
    RANGE: float
    buffer: torch.dtype


@lru_cache(maxsize=64)
def plan(dtype: torch.dtype, device: torch.device, H: int, K: int, HV: int, V: int) -> tuple[Config, Shape]:
    """What the kernels run with for v of this dtype on this device. ValueError as `config_for`."""
    config = config_for(dtype, K, V, shared_memory(device))
    # Operands are bfloat16 for float16 tensors too: decay factors and gradients need its range. float32 tensors take a
    # smaller RANGE, since the rounding error of a sum of log-decays grows with it.
    exact = dtype == torch.float32
    DT, buffer = (tl.float32, torch.float32) if exact or INTERPRET else (tl.bfloat16, torch.bfloat16)
    PREC = "ieee" if INTERPRET else "tf32x3"
    # The inverse of a chunk with bfloat16 operands is rounded to bfloat16 at once, so tf32 products cost it nothing.
    SOLVE = "tf32" if DT is tl.bfloat16 else PREC
    # bfloat16 tiles narrower than 64 gave wrong products on Hopper with Triton 3.6.
    least = 64 if DT is tl.bfloat16 else 16
    KP, VP = (max(least, triton.next_power_of_2(size)) for size in (K, V))
    LOG_C = config.chunk.bit_length() - 1
    return config, Shape(H, HV, K, V, KP, VP, config.chunk, LOG_C, DT, PREC, SOLVE, 20.0 if exact else 70.0, buffer)


def scan_tile(config: Config, spans: int, s: Shape) -> tuple[int, int, int]:
    """BV, warps and stages of a scan over so many sequences or segments."""
    programs = spans * s.HV * s.VP // config.scan[0]
    BV, warps, stages = config.scan if programs >= FEW else config.narrow_scan
    return min(s.VP, BV), warps, stages


def segment_length(config: Config, M: int, N: int, s: Shape) -> int:
    """Chunks of a segment when M chunks are N sequences; 0 when these are short or keep the GPU busy as they are.

    Segments triple the work of the scan, so that they must shorten it by more.
    """
    programs = N * s.HV * max(1, s.VP // config.scan[0])
    if programs == 0 or programs > SEGMENTED or M < 8 * SHORT * N:
        return 0
    return max(SHORT, -(-M * programs // BUSY // N))
