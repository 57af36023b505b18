"""(I + T)^-1 of a strictly lower triangular [C, C] tile."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from gdn2.ops.kernels.tiles import half_pair


@triton.jit
def unit_lower_inverse(T, LOG_C: tl.constexpr, PREC: tl.constexpr):
    """A = (I + T)^-1 (21), by doubling the size of inverted diagonal blocks; C = 2**LOG_C.

    A pair of blocks with inverses A1, A2 and L below the diagonal inverts to [[A1, 0], [-A2 L A1, A2]]; on the whole
    tile that is A - A L A. Only true entries of the inverse are ever formed, so a chunk of identical keys, whose powers
    of T are astronomically large, is as exact as by substitution. Up to 16 the blocks are a batch of small products.
    """
    C: tl.constexpr = 2**LOG_C
    BLOCKS: tl.constexpr = C // 16
    rows, block, row = tl.arange(0, C), tl.arange(0, BLOCKS), tl.arange(0, 16)
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    D = tl.sum(tl.where(diagonal, tl.reshape(T, (BLOCKS, 16, BLOCKS, 16)), 0.0), 2)
    A = tl.where((row[:, None] == row[None, :])[None, :, :], 1.0, 0.0) - tl.where(half_pair(row, 0)[None, :, :], D, 0.0)
    for level in tl.static_range(1, 4):
        L = tl.where(half_pair(row, level)[None, :, :], D, 0.0)
        A -= tl.dot(tl.dot(A, L, input_precision=PREC), A, input_precision=PREC)
    A = tl.reshape(tl.where(diagonal, A[:, :, None, :], 0.0), (C, C))
    for level in tl.static_range(4, LOG_C):
        L = tl.where(half_pair(rows, level), T, 0.0)
        A -= tl.dot(tl.dot(A, L, input_precision=PREC), A, input_precision=PREC)
    return A
