"""Cross-entropy in at least float32 from logits of any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.fused import fused


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Nats [R] of targets [R] int64 under logits [R, V], 0 where a target is `ignored`; differentiable in the logits.

    float32 (float64 for float64 logits). Fused where operations are, without a float32 copy of the logits.
    """
    if fused(logits):
        from gdn2.ops.kernels import cross_entropy as kernels

        return kernels.cross_entropy(logits, targets, ignored)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignored, reduction="none")
