"""What `generate` of transformers carries from call to call: the states of our blocks.

They have one row per sequence. Columns, padding included, are counted once per forward pass. A recurrent state cannot
be cropped; `copy.deepcopy` of a cache keeps it to return to.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from gdn2.layers.state import state_rows


class Gdn2Cache(Cache):
    """The state of every block, one row per sequence, or None before the first token."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: Any = None
        self.seen = 0

    def advance(self, state: Any, columns: int) -> None:
        """Hold the state after another `columns` tokens, padding included."""
        self.state, self.seen = state, self.seen + columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.state is not None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = state_rows(self.state, indices.to(self.state[0][0].device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = self.state[0][0].shape[0]
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove all tokens, or none. ValueError for what lies between: a recurrence cannot be undone."""
        if tokens_to_remove == self.seen:
            self.reset()
        elif tokens_to_remove != 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove} of {self.seen}; expected 0 or all: a recurrent state cannot "
                "be cropped; keep a copy.deepcopy of the cache to return to"
            )

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state[0][0].shape[0]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        """False: `generate` then leaves away the tokens that the cache has seen, as our counter lets it."""
        return [False]
