"""The gates of the delta rule from what the layer projects, all three in one pass and their gradients in another.

    log_decay = -exp(rate) softplus(f + delta)      erase = largest * sigmoid(b)      write = sigmoid(w)        (11, 12)

The backward reads f, and the gates themselves in place of b and w:

    df = -dlog_decay exp(rate) sigmoid(f + delta)      ddelta = sum_tokens df      drate = sum dlog_decay * log_decay
    db = derase * erase * (1 - erase / largest)        dw = dwrite * write * (1 - write)
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels.conv import sigmoid
from gdn2.ops.kernels.norm import row_tile, store_row_tile
from gdn2.ops.kernels.run import INTERPRET, run

TILE = (16, 16) if INTERPRET else (16, 128)  # tokens and channels
TILES = 4  # of tokens one after the other in a program of the backward, for fewer partial sums


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to float32 rounding for every x.

    log1p(e) = 2 artanh(z), z = e / (2 + e) <= 1/3, by its series: GPUs' fast logarithm is wrong near 1, and the decays
    of a fresh layer live there. The first term left out is z^15 / 15 < 5e-9 of the first.
    """
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    s = z * z
    tail = 1 / 9 + s * (1 / 11 + s * (1 / 13))
    return tl.maximum(x, 0.0) + 2.0 * z * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * tail))))


@triton.jit
def decay_parameters(rate_ptr, delta_ptr, cols, KEYS: tl.constexpr, K: tl.constexpr):
    """-exp(rate) and delta of key channels."""
    rate = tl.load(rate_ptr + cols // K, mask=cols < KEYS, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + cols, mask=cols < KEYS, other=0.0).to(tl.float32)
    return -tl.exp(rate)[None, :], delta[None, :]


@triton.jit
def activate(
    f_ptr, b_ptr, w_ptr, rate_ptr, delta_ptr, g_ptr, erase_ptr, write_ptr, tokens, largest,
    KEYS: tl.constexpr, VALUES: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BT tokens of BC key channels (log-decay and erase) or value channels (write)."""
    KEY_PARTS: tl.constexpr = (KEYS + BC - 1) // BC
    PARTS: tl.constexpr = KEY_PARTS + (VALUES + BC - 1) // BC
    part = tl.program_id(0) % PARTS
    t = tl.program_id(0) // PARTS * BT + tl.arange(0, BT)
    if part < KEY_PARTS:
        cols = part * BC + tl.arange(0, BC)
        pace, delta = decay_parameters(rate_ptr, delta_ptr, cols, KEYS, K)
        store_row_tile(g_ptr, pace * softplus(row_tile(f_ptr, t, cols, tokens, KEYS) + delta), t, cols, tokens, KEYS)
        store_row_tile(erase_ptr, largest * sigmoid(row_tile(b_ptr, t, cols, tokens, KEYS)), t, cols, tokens, KEYS)
    else:
        cols = (part - KEY_PARTS) * BC + tl.arange(0, BC)
        store_row_tile(write_ptr, sigmoid(row_tile(w_ptr, t, cols, tokens, VALUES)), t, cols, tokens, VALUES)


@triton.jit
def sigmoid_gradient(dy_ptr, y_ptr, dx_ptr, t, cols, tokens, D: tl.constexpr, largest):
    """dx for y = largest * sigmoid(x), from y."""
    y = row_tile(y_ptr, t, cols, tokens, D)
    store_row_tile(dx_ptr, row_tile(dy_ptr, t, cols, tokens, D) * y * (1.0 - y / largest), t, cols, tokens, D)


@triton.jit
def activate_back(
    dg_ptr, derase_ptr, dwrite_ptr, f_ptr, erase_ptr, write_ptr, rate_ptr, delta_ptr,
    df_ptr, db_ptr, dw_ptr, sums_ptr, tokens, largest,
    KEYS: tl.constexpr, VALUES: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """As `activate`, BT * TILES tokens; and their share of drate and ddelta by channel, sums [programs, 2, KEYS]."""
    KEY_PARTS: tl.constexpr = (KEYS + BC - 1) // BC
    PARTS: tl.constexpr = KEY_PARTS + (VALUES + BC - 1) // BC
    part, block = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    first = block * TILES * BT + tl.arange(0, BT)
    if part < KEY_PARTS:
        cols = part * BC + tl.arange(0, BC)
        pace, delta = decay_parameters(rate_ptr, delta_ptr, cols, KEYS, K)
        drate, ddelta = tl.zeros((BT, BC), tl.float32), tl.zeros((BT, BC), tl.float32)
        for i in range(TILES):
            t = first + i * BT
            x = row_tile(f_ptr, t, cols, tokens, KEYS) + delta
            dsoftplus = row_tile(dg_ptr, t, cols, tokens, KEYS) * pace
            df = dsoftplus * sigmoid(x)
            store_row_tile(df_ptr, df, t, cols, tokens, KEYS)
            drate += dsoftplus * softplus(x)
            ddelta += df
            sigmoid_gradient(derase_ptr, erase_ptr, db_ptr, t, cols, tokens, KEYS, largest)
        sums = sums_ptr + block.to(tl.int64) * 2 * KEYS + cols
        tl.store(sums, tl.sum(drate, 0), mask=cols < KEYS)
        tl.store(sums + KEYS, tl.sum(ddelta, 0), mask=cols < KEYS)
    else:
        cols = (part - KEY_PARTS) * BC + tl.arange(0, BC)
        for i in range(TILES):
            sigmoid_gradient(dwrite_ptr, write_ptr, dw_ptr, first + i * BT, cols, tokens, VALUES, 1.0)


def _sizes(f: Tensor, write: Tensor, rate: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Tokens, column parts, and the kernels' constants."""
    keys, values = f.shape[-1], write.shape[-1]
    parts = triton.cdiv(keys, TILE[1]) + triton.cdiv(values, TILE[1])
    return f.numel() // keys, parts, (keys, values, keys // rate.shape[0], *TILE)


@torch.library.custom_op("gdn2::gates", mutates_args=())
def gates(
    f: Tensor, b: Tensor, w: Tensor, rate: Tensor, delta: Tensor, largest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """log-decay (float32, nats), erase and write (in the dtypes of b and w) from their pre-activations.

    f, b [..., H * K] and w [..., HV * V] over the same tokens; rate [H] per key head and delta [H * K], both float32;
    `largest` is the largest erase, 2 with negative eigenvalues. The results have the shapes of f, b and w.
    """
    f, b, w = f.contiguous(), b.contiguous(), w.contiguous()
    tokens, parts, constants = _sizes(f, w, rate)
    g, erase, write = torch.empty_like(f, dtype=torch.float32), torch.empty_like(b), torch.empty_like(w)
    args = (f, b, w, rate, delta, g, erase, write, tokens, largest)
    run(activate, parts * triton.cdiv(tokens, TILE[0]), args, constants)
    return g, erase, write


@gates.register_fake
def _(f: Tensor, b: Tensor, w: Tensor, rate: Tensor, delta: Tensor, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    return f.new_empty(f.shape, dtype=torch.float32), b.new_empty(b.shape), w.new_empty(w.shape)


@torch.library.custom_op("gdn2::gates_backward", mutates_args=())
def _gates_backward(
    dg: Tensor, derase: Tensor, dwrite: Tensor, f: Tensor, erase: Tensor, write: Tensor,
    rate: Tensor, delta: Tensor, largest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of f, b, w, rate and delta."""
    dg, derase, dwrite, f = dg.contiguous(), derase.contiguous(), dwrite.contiguous(), f.contiguous()
    tokens, parts, constants = _sizes(f, write, rate)
    df, db, dw = torch.empty_like(f), torch.empty_like(erase), torch.empty_like(write)
    blocks = triton.cdiv(tokens, TILE[0] * TILES)
    sums = torch.empty(blocks, 2, f.shape[-1], dtype=torch.float32, device=f.device)
    run(
        activate_back, parts * blocks,
        (dg, derase, dwrite, f, erase, write, rate, delta, df, db, dw, sums, tokens, largest), (*constants, TILES),
    )  # fmt: skip
    drate, ddelta = sums.sum(0)
    return df, db, dw, drate.view(rate.shape[0], -1).sum(1).to(rate.dtype), ddelta.to(delta.dtype, copy=True)


@_gates_backward.register_fake
def _(
    dg: Tensor, derase: Tensor, dwrite: Tensor, f: Tensor, erase: Tensor, write: Tensor,
    rate: Tensor, delta: Tensor, largest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    df, db, dw, drate, ddelta = (x.new_empty(x.shape) for x in (f, erase, write, rate, delta))
    return df, db, dw, drate, ddelta


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    f, _, _, rate, delta, ctx.largest = inputs
    ctx.save_for_backward(f, *output[1:], rate, delta)


def _backward(ctx: Any, dg: Tensor, derase: Tensor, dwrite: Tensor) -> tuple[Tensor | None, ...]:
    return *_gates_backward(dg, derase, dwrite, *ctx.saved_tensors, ctx.largest), None


gates.register_autograd(_backward, setup_context=_setup)
