"""Muon for the matrices inside the blocks, AdamW for all else, as one optimizer."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from gdn2.config import OptimConfig
from gdn2.model import LanguageModel


def block_matrices(model: LanguageModel) -> list[nn.Parameter]:
    """The weights of the blocks' Linears: what Muon's orthogonal updates are meant for. No embedding, head or taps."""
    return [cast(nn.Parameter, m.weight) for m in model.blocks.modules() if isinstance(m, nn.Linear)]


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on some parameters and `torch.optim.AdamW` on groups of others.

    Muon's updates are scaled to the size of AdamW's ("match_rms_adamw", arXiv 2502.16982), so that learning rate and
    weight decay mean the same for both. `param_groups` holds the groups of either, `state` the state of all.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: list[dict[str, Any]], config: OptimConfig, fused: bool
    ) -> None:
        common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        self._muon = torch.optim.Muon(matrices, **common, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, **common, betas=config.betas, eps=config.eps, fused=fused)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the two work on this optimizer's groups and state."""
        first = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:first], self.param_groups[first:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self._muon.step()
        self._adamw.step()
