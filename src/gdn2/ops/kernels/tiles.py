"""Device functions: tiles of tokens, sums of log-decays, and the levels that keep every decay ratio exact.

A chunk has C tokens (rows). Between row r and an earlier row s a channel decays by gamma_r / gamma_s = exp(G_r - G_s).
Differences of long sums cancel, and gamma^-1 overflows, so ratios are built from sums that start at an anchor:

    P[r]  sum of g over the rows of r's block up to r               (inclusive prefix)
    X[s]  sum of g over the rows of s's block after s               (exclusive suffix)

With blocks of size h, row r in the later half and s in the earlier half of a pair of blocks have the ratio
exp(P[r]) exp(X[s]): both exponents are <= 0, whatever the decay. Inside one block an anchor row between r and s does:
exp(D[r]) exp(-D[s]), D the sum from the anchor to the row (negative before it), as long as neither factor leaves the
normal range. A chunk none of whose halves decays by more than RANGE takes its middle as the only anchor; that is every
ordinary chunk. A *strong* chunk takes the pairs of halves of 32, then of 16 and so on, until no remaining block decays
by more than RANGE; it is left to a second launch, so that neither kind pays for the other.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def offsets(rows, cols, WIDTH: tl.constexpr):
    """Element offsets of a row-major tile inside a matrix of WIDTH columns.

    They are 32-bit, and go onto a scalar 64-bit base: tiles of one shape then share them, where a 64-bit pointer for
    every element would fill the registers.
    """
    return rows[:, None] * WIDTH + cols[None, :]


@triton.jit
def token_tile(x, token, rows, n, head, HEADS: tl.constexpr, D: tl.constexpr, first, WIDTH: tl.constexpr):
    """Rows `rows` < n after `token` and WIDTH channels from `first` of a [tokens, HEADS, D] tensor, in float32; zero
    beyond n and D.

    x is a pointer or, for rows from 0, a descriptor of such tiles: those arrive in shared memory swizzled, so that it
    is read in the layout of the products' results without bank conflicts.
    """
    if isinstance(x, tl.tensor_descriptor):
        tile = x.load([token.to(tl.int32), head * D + first])
        tile = tl.where(rows[:, None] < n, tile.to(tl.float32), 0.0)
    else:
        base, cols = x + (token * HEADS + head) * D, first + tl.arange(0, WIDTH)
        mask = (rows[:, None] >= 0) & (rows[:, None] < n) & (cols[None, :] < D)
        tile = tl.load(base + offsets(rows, cols, HEADS * D), mask=mask, other=0.0).to(tl.float32)
    return tile


@triton.jit
def scratch_tile(
    x, unit, ROWS: tl.constexpr, COLS: tl.constexpr, top, HEIGHT: tl.constexpr, first, WIDTH: tl.constexpr
):
    """HEIGHT rows from `top` and WIDTH columns from `first` of matrix `unit` of [units, ROWS, COLS], as stored."""
    if isinstance(x, tl.tensor_descriptor):
        tile = x.load([(unit * ROWS + top).to(tl.int32), first])
    else:
        rows, cols = top + tl.arange(0, HEIGHT), first + tl.arange(0, WIDTH)
        tile = tl.load((x + unit * ROWS * COLS) + offsets(rows, cols, COLS))
    return tile


@triton.jit
def gate_tile(
    x, token, rows, n, head, HEADS: tl.constexpr, D: tl.constexpr, first, WIDTH: tl.constexpr, FILL: tl.constexpr
):
    """`token_tile` of a gate whose D is 0 (absent: FILL everywhere), 1 (shared by the channels) or the head size."""
    if D == 0:
        return tl.full((rows.shape[0], WIDTH), FILL, tl.float32)
    elif D == 1:
        shared = tl.load(x + token * HEADS + head + rows * HEADS, mask=rows < n, other=0.0).to(tl.float32)
        return tl.broadcast_to(shared[:, None], (rows.shape[0], WIDTH))
    else:
        return token_tile(x, token, rows, n, head, HEADS, D, first, WIDTH)


@triton.jit
def store_token_tile(ptr, x, token, rows, n, head, HEADS: tl.constexpr, D: tl.constexpr, cols):
    base = ptr + (token * HEADS + head) * D
    mask = (rows[:, None] < n) & (cols[None, :] < D)
    tl.store(base + offsets(rows, cols, HEADS * D), x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, DT: tl.constexpr, PREC: tl.constexpr):
    """a b with operands in DT and a float32 result; PREC holds for float32 operands only."""
    return tl.dot(a.to(DT), b.to(DT), input_precision=PREC)


@triton.jit
def add_up(M, x, DT: tl.constexpr, PREC: tl.constexpr):
    """M x, nearly as exact in x as in float32: for an M of 0, 1 and -1 it is cheaper, on tensor cores, than a scan.

    With bfloat16 operands x is taken as the sum of two, which leaves 2^-17 of each term.
    """
    high = x.to(DT)
    total = tl.dot(M.to(DT), high, input_precision=PREC)
    if tl.float32 != DT:
        total = tl.dot(M.to(DT), (x - high.to(tl.float32)).to(DT), total)
    return total


@triton.jit
def from_middle(rows, C: tl.constexpr):
    """[C, C] matrix M such that D = M g is G - G_middle."""
    later, right = rows[:, None] >= rows[None, :], rows[None, :] >= C // 2
    return tl.where(later & right, 1.0, 0.0) - tl.where((later | right) == 0, 1.0, 0.0)


@triton.jit
def _restart(flag_a, a, flag_b, b):
    return flag_a | flag_b, tl.where(flag_b != 0, b, a + b)


@triton.jit
def block_sums(g, g_next, rows, level):
    """P and X for blocks of size 2**level; g_next is g moved up by one row (g_next[s] = g[s + 1])."""
    size = 1 << level
    start = tl.broadcast_to(((rows & (size - 1)) == 0).to(tl.int32)[:, None], g.shape)
    _, P = tl.associative_scan((start, g), 0, _restart)
    last = (rows & (size - 1)) == size - 1
    end = tl.broadcast_to(last.to(tl.int32)[:, None], g.shape)
    _, X = tl.associative_scan((end, tl.where(last[:, None], 0.0, g_next)), 0, _restart, reverse=True)
    return P, X


@triton.jit
def half_pair(rows, level):
    """[C, C] mask: r in the later and s in the earlier block of a pair of blocks of size 2**level."""
    block = rows >> level
    return (block[:, None] == block[None, :] + 1) & ((block[:, None] & 1) == 1)


@triton.jit
def same_block(rows, level):
    """[C, C] mask: s earlier than r in one block of size 2**level."""
    return ((rows >> level)[:, None] == (rows >> level)[None, :]) & (rows[:, None] > rows[None, :])
