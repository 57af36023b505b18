"""The likeliest token of each row of logits, in one kernel that nothing waits for."""

# mypy: disable-error-code="no-untyped-def, assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.early import begin_early, wait_for_inputs
from gdn2.ops.kernels.run import run

BLOCK = 8_192  # logits that a program looks at at once
WARPS = 16


@triton.jit
def find_likeliest(logits_ptr, token_ptr, words, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """The first index of a row's largest number, or -1 where one of them is NaN."""
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    largest, at, broken = tl.full((BLOCK,), float("-inf"), tl.float32), cols, tl.zeros((BLOCK,), tl.int32)
    wait_for_inputs(EARLY)
    for begin in range(0, words, BLOCK):
        x = tl.load(logits_ptr + row * words + begin + cols, mask=begin + cols < words, other=float("-inf"))
        x = x.to(tl.float32)
        at = tl.where(x > largest, begin + cols, at)
        largest = tl.where(x > largest, x, largest)
        broken = tl.where(x == x, broken, 1)
    first = tl.min(tl.where(largest == tl.max(largest), at, words))
    tl.store(token_ptr + row, tl.where(tl.max(broken) > 0, -1, first).to(tl.int64))


def likeliest(logits: Tensor) -> Tensor:
    """[N, vocab] of at most 32 bits -> [N] int64; -1 where a logit is NaN."""
    logits = logits.contiguous()
    verdicts.demand(verdicts.DECODE, logits.device)
    N, words = logits.shape
    tokens = torch.empty(N, dtype=torch.int64, device=logits.device)
    early = begin_early(logits.device)
    run(
        find_likeliest, N, (logits, tokens, words), (min(BLOCK, triton.next_power_of_2(words)), early), WARPS,
        early=early > 0,
    )  # fmt: skip
    return tokens
