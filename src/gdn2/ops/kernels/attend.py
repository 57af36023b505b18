"""One token of window attention: rotation, its place in the ring, and a softmax over the ring, a tile of it a program.

Each program makes a softmax over its tile's keys and leaves the largest score, the sum and the unfinished output; a
second kernel puts the tiles of a head together. Nothing waits for the GPU, so that a CUDA graph can capture the step.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.run import run

TILE = 64  # keys of a program


@triton.jit
def rotated_half(x_ptr, cols, inside, cos, sin, HALF: tl.constexpr, SIGN: tl.constexpr):
    """One half of the rotated head, rounded as the ring keeps it: a cos - b sin, or b cos + a sin of the other."""
    own = tl.load(x_ptr + cols + (HALF if SIGN > 0 else 0), mask=inside, other=0.0)
    other = tl.load(x_ptr + cols + (0 if SIGN > 0 else HALF), mask=inside, other=0.0)
    return (own.to(tl.float32) * cos + SIGN * other.to(tl.float32) * sin).to(own.dtype)


@triton.jit
def attend_tile(
    q_ptr, k_ptr, v_ptr, frequency_ptr, keys_ptr, values_ptr, position_ptr, part_ptr, scale, slots, tiles,
    HEADS: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE slots of one head's ring. part [.., D + 2]: the output before its division, the largest score, the sum."""
    HALF: tl.constexpr = D // 2
    unit, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row, head = unit // HEADS, unit % HEADS
    position = tl.load(position_ptr + row)
    cols, full = tl.arange(0, HP), tl.arange(0, DP)
    is_col, is_full = cols < HALF, full < D
    turns = position.to(tl.float64) * tl.load(frequency_ptr + cols, mask=is_col, other=0.0) / 6.283185307179586
    angle = ((turns - tl.floor(turns)) * 6.283185307179586).to(tl.float32)
    cos, sin = tl.cos(angle), tl.sin(angle)
    own = unit * D
    ring = (row * slots * HEADS + head) * D
    here = (position % slots).to(tl.int64)
    if here // TILE == tile:
        at = ring + here * HEADS * D
        tl.store(keys_ptr + at + cols, rotated_half(k_ptr + own, cols, is_col, cos, sin, HALF, -1), mask=is_col)
        tl.store(keys_ptr + at + HALF + cols, rotated_half(k_ptr + own, cols, is_col, cos, sin, HALF, 1), mask=is_col)
        tl.store(values_ptr + at + full, tl.load(v_ptr + own + full, mask=is_full, other=0.0), mask=is_full)
    tl.debug_barrier()  # the program reads what its own threads have written
    slot = tile * TILE + tl.arange(0, TILE)
    seen = (slot < slots) & ((slot <= position) | (position >= slots))
    rows = ring + slot.to(tl.int64)[:, None] * HEADS * D
    mask = seen[:, None] & is_col[None, :]
    first = tl.load(keys_ptr + rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(keys_ptr + rows + HALF + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    q_first = rotated_half(q_ptr + own, cols, is_col, cos, sin, HALF, -1).to(tl.float32)
    q_second = rotated_half(q_ptr + own, cols, is_col, cos, sin, HALF, 1).to(tl.float32)
    score = tl.sum(first * q_first[None, :] + second * q_second[None, :], 1) * scale
    score = tl.where(seen, score, float("-inf"))
    largest = tl.maximum(tl.max(score), -1e30)  # finite where nothing is seen
    p = tl.exp(score - largest)
    values = tl.load(values_ptr + rows + full[None, :], mask=seen[:, None] & is_full[None, :], other=0.0)
    part = part_ptr + (unit * tiles + tile) * (D + 2)
    tl.store(part + full, tl.sum(p[:, None] * values.to(tl.float32), 0), mask=is_full)
    tl.store(part + D, largest)
    tl.store(part + D + 1, tl.sum(p))


@triton.jit
def join_tiles(
    part_ptr, position_ptr, o_ptr, tiles, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """The output of one head; the first head's program also counts the token."""
    unit = tl.program_id(0).to(tl.int64)
    full, part = tl.arange(0, DP), part_ptr + unit * tiles * (D + 2)
    largest, total, output = -1e30, 0.0, tl.zeros((DP,), tl.float32)
    for begin in range(0, tiles, BT):
        tile = begin + tl.arange(0, BT)
        found = tl.load(part + tile * (D + 2) + D, mask=tile < tiles, other=-1e30)
        above = tl.maximum(largest, tl.max(found))
        share, kept = tl.exp(found - above), tl.exp(largest - above)
        sums = tl.load(part + tile * (D + 2) + D + 1, mask=tile < tiles, other=0.0)
        total = total * kept + tl.sum(sums * share)
        parts = tl.load(
            part + tile[:, None] * (D + 2) + full[None, :],
            mask=(tile < tiles)[:, None] & (full < D)[None, :],
            other=0.0,
        )
        output = output * kept + tl.sum(parts * share[:, None], 0)
        largest = above
    tl.store(o_ptr + unit * D + full, (output / total).to(o_ptr.dtype.element_ty), mask=full < D)
    if unit % HEADS == 0:
        at = position_ptr + unit // HEADS
        tl.store(at, tl.load(at) + 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float
) -> Tensor:
    """o [N, heads, D] of one token of N sequences; its key and value go into the rings, and positions count it.

    q, k, v [N, heads, D] before rotation; frequencies [D / 2] float64, radians a token; keys, values [N, slots, heads,
    D] of the same dtype; position [N] int64. No gradients. ValueError for rings and positions that are not contiguous.
    """
    (N, heads, D), slots = q.shape, keys.shape[1]
    for name, x in (("keys", keys), ("values", values), ("position", position)):
        if not x.is_contiguous():
            raise ValueError(f"{name} of the state have strides {x.stride()}; expected them contiguous")
    q, k, v, frequencies = q.contiguous(), k.contiguous(), v.contiguous(), frequencies.contiguous()
    tiles = triton.cdiv(slots, TILE)
    verdicts.demand(verdicts.DECODE, q.device)
    part = torch.empty(N, heads, tiles, D + 2, dtype=torch.float32, device=q.device)
    o = torch.empty_like(q)
    HP, DP = triton.next_power_of_2(D // 2), triton.next_power_of_2(D)
    run(
        attend_tile, N * heads * tiles, (q, k, v, frequencies, keys, values, position, part, scale, slots, tiles),
        (heads, D, HP, DP, TILE),
    )  # fmt: skip
    run(join_tiles, N * heads, (part, position, o, tiles), (heads, D, DP, 32))
    return o
