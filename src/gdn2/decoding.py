"""The decoding step: one token for each row of a state that is written in place; on a GPU one CUDA graph.

Nothing about a step changes from one token to the next but numbers in tensors that stay where they are: the tokens, the
state and its positions, the logits. So a GPU runs the whole model from a graph that is captured once, without a launch
or a decision on the host. Elsewhere the same code runs without a graph.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdn2.layers.state import (
    AttentionState,
    check_memory_dtype,
    overwrite,
    state_bytes,
    state_rows,
    wide_memory,
    with_memory,
    with_room,
)
from gdn2.model import LanguageModel
from gdn2.ops.fused import fused

LEAST_ROOM = 64  # keys; full attention's room grows by a quarter, so that a graph is captured anew only now and then

_log = logging.getLogger("gdn2")


class DecodeStep:
    """Takes steps of `rows` sequences at a time.

    Args:
        model: in evaluation mode. A graph sees changes of its weights in place, but none that give it other tensors, as
            moving, casting and quantizing do.
        rows: sequences N.
        graph: whether to step from a CUDA graph; None does so on a GPU, unless autocast is on: what it casts would be
            captured with the step and cast again for every token. Give it a model in bfloat16 instead.
        memory_dtype: what memories are kept in from token to token. bfloat16 halves them and their traffic, and rounds
            them after each token; None is what the model says, at least float32.

    Attributes:
        state: the model's state of all rows. Write it in place (`put`) or read it; the tensors are the step's own.
        logits: [N, vocab] float32 of the last step. likeliest: [N] int64, its argmax in each row, -1 where a logit is
            NaN. Both are written over by the next step.

    Raises:
        ValueError: rows below 1, another memory_dtype, or a graph asked for where there can be none.
    """

    @torch.inference_mode()
    def __init__(
        self, model: LanguageModel, rows: int, graph: bool | None = None, memory_dtype: torch.dtype | None = None
    ) -> None:
        check_memory_dtype(memory_dtype)
        if rows < 1:
            raise ValueError(f"rows is {rows}; expected an integer >= 1")
        self.model, self.rows, self.memory_dtype = model, rows, memory_dtype
        self.device = next(model.parameters()).device
        # Shards are gathered by hooks of a whole forward pass, and only of that.
        self._sharded = any(hasattr(parameter, "placements") for parameter in model.parameters())
        self.graph = _graph_here(self.device) and not self._sharded if graph is None else graph
        if self.graph:
            _require_graph(self.device)
            if self._sharded:
                raise ValueError(
                    "graph is True and the model's weights are sharded; expected whole ones, or graph None"
                )
            model.pack()
        self._full = model.config.window is None and "attention" in model.config.layer_kinds
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self._captured: Any = None
        self._copied: Any = None  # a value that equals the state, for as long as nothing changes that
        self.state = self._prepare(LEAST_ROOM)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of all rows."""
        return state_bytes(self.state)

    @property
    def room(self) -> int | None:
        """Tokens that a row of full attention can hold; None without full attention."""
        return next(b.keys.shape[1] for b in self.state if isinstance(b, AttentionState)) if self._full else None

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Read a token in each row; returns `logits`, and sets `likeliest`.

        tokens: N ids, or [N] int64 on the model's device. With full attention see to `make_room` before.
        ValueError for another number of them, or another dtype.
        """
        self._copied = None
        N = len(self._tokens)
        if isinstance(tokens, Tensor) and (tokens.shape != (N,) or tokens.dtype != torch.int64):
            raise ValueError(f"tokens are {tokens.dtype} of shape {list(tokens.shape)}; expected int64 of shape [{N}]")
        if len(tokens) != N:
            raise ValueError(f"{len(tokens)} tokens; expected {N}, one for each row")
        if isinstance(tokens, Tensor):
            self._tokens[:, 0].copy_(tokens)
        else:
            self._tokens.copy_(torch.tensor(tokens)[:, None])
        if self._captured is None:
            self._step()
        else:
            self._captured.replay()
        return self.logits

    @torch.inference_mode()
    def put(self, row: int, state: Any) -> None:
        """Make `state`, of one row, the state of a row. With full attention that row's room must hold its tokens."""
        self._copied = None
        if self._full:
            state = with_room(state, self.room or 0)
        for block, new in zip(self.state, state):
            overwrite([tensor[row : row + 1] for tensor in block], new)

    @torch.inference_mode()
    def take(self, row: int, length: int) -> Any:
        """A copy of a row's state, which has read `length` tokens; of full attention without the room beyond them."""
        state = state_rows(self.state, torch.tensor([row], device=self.device))  # an index copies
        return with_room(state, length) if self._full else state

    @torch.inference_mode()
    def load(self, state: Any) -> None:
        """Make `state` that of all rows."""
        self._copied = None
        if self._full:
            state = with_room(state, self.room or 0)
        torch._foreach_copy_(_tensors(self.state), _tensors(state))

    @torch.inference_mode()
    def advance(self, state: Any, tokens: Sequence[int], length: int) -> tuple[Tensor, Any]:
        """A step for states that are values: the logits after `tokens`, read from `state`, and the state then.

        Neither is written over later, and `state` is left as it is. length: tokens of the longest row, these included.
        """
        self.make_room(length)
        if state is not self._copied:
            self.load(state)
        logits = self(tokens).clone()
        after = tuple(type(block)(*map(torch.empty_like, block)) for block in self.state)
        torch._foreach_copy_(_tensors(after), _tensors(self.state))
        self._copied = after if not self._full else with_room(after, length)
        return logits, self._copied

    @torch.inference_mode()
    def make_room(self, length: int) -> None:
        """With full attention: room for rows of `length` tokens, the next one included; what is far too much is let go.

        Every row must have fewer tokens than `length`, or be of no more use.
        """
        room, wanted = self.room, max(LEAST_ROOM, length + length // 4)
        if room is None or length <= room <= 2 * wanted:
            return
        before = self.state
        self._captured = None
        self.state = self._prepare(wanted)
        self.load(before)

    def _prepare(self, room: int) -> Any:
        """Fresh state, and what is needed to step on it."""
        dtype = torch.get_autocast_dtype(self.device.type) if torch.is_autocast_enabled(self.device.type) else None
        self.state = with_memory(self.model.initial_state(self.rows, dtype=dtype), self.memory_dtype)
        if self._full:
            self.state = with_room(self.state, room)
        if self.graph:
            self._capture()
        return self.state

    def _step(self) -> None:
        if self._sharded:
            hidden, after = self.model(self._tokens, wide_memory(self.state))
            for block, new in zip(self.state, after if self.room is None else with_room(after, self.room)):
                overwrite(block, new)
            self.logits = self.model.logits(hidden[:, -1])
        else:
            self.logits = self.model.step(self._tokens, self.state)
        self.likeliest = likeliest_tokens(self.logits)

    def _capture(self) -> None:
        here, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # compiles kernels and makes the libraries' workspaces, which a capture cannot
            for _ in range(2):
                self._step()
        here.wait_stream(aside)
        for block in self.state:  # every mixer's state before the first token is zeros
            for tensor in block:
                tensor.zero_()
        # The graph reads these where they are, also should the model be given others.
        self._weights = [tensor.detach() for tensor in (*self.model.parameters(), *self.model.buffers())]
        self._captured = torch.cuda.CUDAGraph()
        # Other threads, such as a server's, may go on allocating meanwhile.
        with torch.cuda.device(self.device), torch.cuda.graph(self._captured, capture_error_mode="thread_local"):
            self._step()


def _tensors(state: Any) -> list[Tensor]:
    return [tensor for block in state for tensor in block]


def likeliest_tokens(logits: Tensor) -> Tensor:
    """[N, vocab] -> [N] int64, -1 where a logit is NaN; it does not wait for the GPU."""
    if fused(logits):
        from gdn2.ops.kernels.choose import likeliest

        return likeliest(logits)
    tokens = logits.argmax(-1)
    broken = logits.gather(1, tokens[:, None])[:, 0].isnan()  # to argmax a NaN is the largest number
    return tokens.masked_fill(broken, -1)


def _graph_here(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if torch.is_autocast_enabled("cuda"):
        _log.info("decoding under autocast: no CUDA graph")
        return False
    return True


def _require_graph(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"graph is True and the model on {device}; expected one on a CUDA device, or graph None")
    if torch.is_autocast_enabled("cuda"):
        raise ValueError("graph is True under autocast; expected a model in the wanted dtype, or graph None")
