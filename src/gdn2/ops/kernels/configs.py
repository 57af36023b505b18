"""What the kernels run with: the configuration for this GPU, and the sizes that they are compiled for. No search."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.run import INTERPRET
from gdn2.ops.kernels.tables import CONFIGS, H100_SHARED, INTERPRETED, LEAST_SHARED, MAX_HEAD, Config

FEW = 65  # programs of a scan below which it takes narrower tiles, to keep more of the GPU busy
SEGMENTED = 16  # programs of a scan up to which long sequences are cut into segments
BUSY = 128  # programs of a scan over segments: one fills a multiprocessor's shared memory
SHORT = 16  # chunks that a segment has at least

Answer = TypeVar("Answer")

_log = logging.getLogger("gdn2")
_shared_memory: dict[torch.device, int] = {}
_forced: dict[str, Config] = {}
_forced_segment: int | None = None


def constant(function: Callable[[torch.device], Answer]) -> Callable[[torch.device], Answer]:
    """For torch.compile the result depends on the arguments alone.

    What `torch.compiler.assume_constant_result` does, without loading the compiler: seconds of a process's first call.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def using(configs: dict[str, Config], segment: int | None = None) -> Iterator[None]:
    """Within this context these configurations (by name) run, the tables' otherwise, and nothing is refused.

    `segment` is the number of chunks into which sequences are then cut, 0 for not at all.
    """
    global _forced, _forced_segment
    before = _forced, _forced_segment
    _forced, _forced_segment = configs, segment
    plan.cache_clear()
    try:
        with verdicts.ignoring():
            yield
    finally:
        _forced, _forced_segment = before
        plan.cache_clear()


@constant
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program on this device may have; an H100's where there is no GPU."""
    if device.type != "cuda":
        return H100_SHARED
    if device not in _shared_memory:  # asking the driver takes a millisecond
        index = torch.cuda.current_device() if device.index is None else device.index
        properties = triton.runtime.driver.active.utils.get_device_properties(index)
        _shared_memory[device] = int(properties["max_shared_mem"])
    return _shared_memory[device]


@lru_cache(maxsize=16)
def descriptors(device: torch.device) -> bool:
    """Whether tiles come through descriptors: from Hopper on the hardware copies them."""
    return INTERPRET or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))


@constant
def has_flash_attention(device: torch.device) -> bool:
    """Whether torch's own FlashAttention runs on a GPU: in this build, and from compute capability 8.0."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def named_config(dtype: torch.dtype, K: int, V: int, shared: int = H100_SHARED) -> tuple[str, Config]:
    """Name and values of the configuration for this dtype and head sizes with so many bytes of shared memory.

    ValueError when the kernels have none.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"the Triton kernels take bfloat16, float16 or float32 tensors, not {dtype}")
    if not 1 <= min(K, V) <= max(K, V) <= MAX_HEAD:
        raise ValueError(f"the Triton kernels take head sizes from 1 to {MAX_HEAD}, not K = {K}, V = {V}")
    for bound, needed, config in CONFIGS[4 if dtype == torch.float32 else 2]:
        if max(K, V) <= bound and needed <= shared:
            name = f"{str(dtype).removeprefix('torch.')}, heads up to {bound}"
            return name, INTERPRETED if INTERPRET else config
    raise ValueError(f"the Triton kernels need {LEAST_SHARED} bytes of shared memory a program; this GPU has {shared}")


def config_for(dtype: torch.dtype, K: int, V: int, device: torch.device) -> Config:
    """The configuration to run with. ValueError as `named_config`, and for one that `gdn2 selftest` found wrong."""
    name, config = named_config(dtype, K, V, shared_memory(device))
    if name in _forced:
        return _forced[name]
    verdict = verdicts.demand(name, device)
    if device.type == "cuda" and not verdict.checked and torch.cuda.get_device_capability(device) != (9, 0):
        _log.warning("kernels not checked on this %s; run `gdn2 selftest`", torch.cuda.get_device_name(device))
    return verdict.tuned.get(name, config)


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
    config = config_for(dtype, K, V, device)
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


verdicts.caches.append(plan)


def scan_tile(config: Config, spans: int, s: Shape) -> tuple[int, int, int]:
    """BV, warps and stages of a scan over so many sequences or segments."""
    programs = spans * s.HV * s.VP // config.scan[0]
    BV, warps, stages = config.scan if programs >= FEW else config.narrow_scan
    return min(s.VP, BV), warps, stages


def segment_length(config: Config, M: int, N: int, s: Shape) -> int:
    """Chunks of a segment when M chunks are N sequences; 0 when these are short or keep the GPU busy as they are.

    Segments triple the work of the scan, so that they must shorten it by more.
    """
    if _forced_segment is not None:
        return _forced_segment
    programs = N * s.HV * max(1, s.VP // config.scan[0])
    if programs == 0 or programs > SEGMENTED or M < 8 * SHORT * N:
        return 0
    return max(SHORT, -(-M * programs // BUSY // N))
