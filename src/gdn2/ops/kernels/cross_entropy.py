"""Cross-entropy from logits of any float dtype, in float32 and without a float32 copy of them.

L = log sum_j exp x_j        loss = L - x_target        dx_j = (exp(x_j - L) - [j = target]) dloss
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.op import op
from gdn2.ops.kernels.run import run

BLOCK = 4096  # words at a time
WARPS = 8


@triton.jit
def score_row(
    x_ptr, target_ptr, loss_ptr, log_sum_ptr, V, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The loss of one row, and L. NaN where the target is no word."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    largest, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for start in tl.range(0, V, BLOCK):
        x = tl.load(x_ptr + row * V + start + cols, mask=start + cols < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # as long as all words are impossible
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), 0)
        largest = new
    log_sum = largest + tl.log(total)
    target = tl.load(target_ptr + row)
    is_word = (target >= 0) & (target < V)
    loss = log_sum - tl.load(x_ptr + row * V + target, mask=is_word, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(target == IGNORED, 0.0, loss))
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def score_row_back(
    dloss_ptr, x_ptr, target_ptr, log_sum_ptr, dx_ptr, V, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dx of one row; zero where the target is ignored."""
    row = tl.program_id(0).to(tl.int64)
    target, log_sum = tl.load(target_ptr + row), tl.load(log_sum_ptr + row)
    dloss = tl.load(dloss_ptr + row)
    counts = target != IGNORED
    for start in tl.range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32)
        dx = (tl.exp(x - log_sum) - tl.where(cols == target, 1.0, 0.0)) * dloss
        dx = tl.where(counts, dx, 0.0)
        tl.store(dx_ptr + row * V + cols, dx.to(dx_ptr.dtype.element_ty), mask=cols < V)


@op("gdn2::cross_entropy")
def _cross_entropy(logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    rows, V = logits.shape
    logits, targets = logits.contiguous(), targets.contiguous()
    verdicts.demand(verdicts.AROUND, logits.device)
    loss, log_sum = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    run(score_row, rows, (logits, targets, loss, log_sum, V), (ignored, _block(V)), WARPS)
    return loss, log_sum


def _block(V: int) -> int:
    return min(BLOCK, triton.next_power_of_2(V))


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss)


@op("gdn2::cross_entropy_backward")
def _cross_entropy_backward(dloss: Tensor, logits: Tensor, targets: Tensor, log_sum: Tensor, ignored: int) -> Tensor:
    rows, V = logits.shape
    dloss, logits, targets = dloss.contiguous(), logits.contiguous(), targets.contiguous()
    dx = torch.empty_like(logits)
    run(score_row_back, rows, (dloss, logits, targets, log_sum, dx, V), (ignored, _block(V)), WARPS)
    return dx


@_cross_entropy_backward.register_fake
def _(dloss: Tensor, logits: Tensor, targets: Tensor, log_sum: Tensor, ignored: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.ignored = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dloss: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    return _cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.ignored), None, None


_cross_entropy.register_autograd(_backward, setup_context=_setup)


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Nats [R] float32 of targets [R] int64 under logits [R, V], differentiable in these.

    0 where a target is `ignored`, NaN where it is no word.
    """
    loss: Tensor = _cross_entropy(logits, targets, ignored)[0]
    return loss
