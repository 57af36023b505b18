"""The optimizer with its parameter groups, and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gdn2.config import OptimConfig
from gdn2.model import LanguageModel


def build_optimizer(model: LanguageModel, config: OptimConfig) -> torch.optim.Optimizer:
    """What `optim.name` says: AdamW for all, or Muon for the matrices of the blocks and AdamW for the rest."""
    if config.name == "adamw":
        return adamw(model, config)
    from gdn2.training.muon import MuonAdamW, block_matrices

    matrices = block_matrices(model)
    own = set(matrices)
    return MuonAdamW(matrices, groups([p for p in model.parameters() if p not in own], config), config, fused=True)


def state_bytes(model: LanguageModel, config: OptimConfig) -> int:
    """Bytes of the optimizer's state once it has made a step: of AdamW two moments and the number of steps in float32,
    of Muon a momentum."""
    from gdn2.training.muon import block_matrices

    matrices = set(block_matrices(model)) if config.name == "muon" else set()
    return sum(p.nbytes if p in matrices else 2 * p.nbytes + 4 for p in model.parameters())


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in two groups: matrices (embeddings and convolutions among them) decay, everything else does not.

    No decay for parameters of fewer than two dimensions (norms, biases) and those marked `no_weight_decay`: pulling
    a gate's or a norm's parameter to zero pulls it to an arbitrary setting, not to a smaller function.
    """
    return torch.optim.AdamW(
        groups(model.parameters(), config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def groups(parameters: Iterable[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """The groups of `adamw`: one of each kind, and for sharded parameters one more for each mesh that they lie on.

    A group is updated in one call, of tensors that lie alike.
    """
    decay: dict[Any, list[nn.Parameter]] = {None: []}
    plain: dict[Any, list[nn.Parameter]] = {None: []}
    for parameter in parameters:
        kind = plain if takes_no_decay(parameter) else decay
        kind.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [
        *({"params": some, "weight_decay": config.weight_decay} for some in decay.values()),
        *({"params": some, "weight_decay": 0.0} for some in plain.values()),
    ]


def takes_no_decay(parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2 or getattr(parameter, "no_weight_decay", False)


def learning_rate(config: OptimConfig, tokens: int, total_tokens: int) -> float:
    """The rate of the step that ends at `tokens` seen, of `total_tokens`.

    Linear warm-up to lr; then "cosine" falls over all that is left, "wsd" stays and falls linearly over the last
    decay_tokens (not at all while they are 0), both to lr * min_lr_ratio; "constant" stays.
    """
    low = config.min_lr_ratio
    if tokens < config.warmup_tokens:
        share = tokens / config.warmup_tokens
    elif config.schedule == "cosine":
        progress = (tokens - config.warmup_tokens) / (total_tokens - config.warmup_tokens)
        share = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "wsd" and tokens > total_tokens - config.decay_tokens:
        share = low + (1 - low) * (total_tokens - tokens) / config.decay_tokens
    else:
        share = 1.0
    return config.lr * share
