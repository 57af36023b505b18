"""The memory of a model while it reads a prompt: what each token wrote and erased, whose values were erased, how long
each channel keeps, and how the gates lie.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdn2.data import Tokenizer, load_tokenizer
from gdn2.inference import BlockTrace, trace_blocks, traced_blocks
from gdn2.layers.delta import DeltaMixer
from gdn2.model import LanguageModel, find_checkpoint

MOST_TOKENS = 256
BINS = 24
LONGEST = 16  # half-lives are drawn from 1 to 2^16 tokens; beyond that a channel keeps for good


@dataclass(frozen=True)
class Histogram:
    """Counts of a gate's values over all tokens and channels, in equal bins of [low, high], and their mean."""

    counts: list[int]
    mean: float


@dataclass(frozen=True)
class BlockView:
    """One block. `written`, `erased`, `faded` [T]: root sums of squares over its heads; half_lives: for each head the
    tokens after which each key channel has lost half, sorted (inf where nothing decays)."""

    block: int
    written: list[float]
    erased: list[float]
    faded: list[float]
    half_lives: list[list[float]]
    erase: Histogram
    write: Histogram
    keep: Histogram


@dataclass(frozen=True)
class MemoryView:
    """A prompt's tokens as text, every block with a delta rule, and for the head that erased most, whose values each
    token took out: `taken` [T][T], row t: the part of the value put at s (before t) that t erased, as a signed norm."""

    tokens: list[str]
    blocks: list[BlockView]
    block: int
    head: int
    taken: list[list[float]]
    largest: tuple[float, float]  # that erase and write gates can be


def view_memory(run: Path, prompt: str) -> MemoryView:
    """Read the prompt with the newest checkpoint of a run, on the CPU.

    ValueError for a model without a delta rule, and for a prompt that is empty or longer than 256 tokens.
    """
    folder = find_checkpoint(run)
    model, tokenizer = LanguageModel.from_checkpoint(folder), load_tokenizer(folder)
    blocks = traced_blocks(model)
    if not blocks:
        raise ValueError(
            f"{str(run)!r} is a model of {model.config.mixer!r}; expected a delta rule, whose memory erases"
        )
    tokens = tokenizer.encode(prompt)
    if not 1 <= len(tokens) <= MOST_TOKENS:
        raise ValueError(f"the prompt has {len(tokens)} tokens; expected 1 to {MOST_TOKENS}")
    traces, _ = trace_blocks(model, tokens, model.initial_state(1))
    gates = next(mixer.gates for mixer in model.mixers() if isinstance(mixer, DeltaMixer))
    largest = gates.largest_erase, gates.largest_write
    row = max(range(len(blocks)), key=lambda i: float(traces[i].erased.square().sum(0).max()))
    head = int(traces[row].erased.square().sum(0).argmax())
    return MemoryView(
        token_texts(tokenizer, tokens),
        [_block(block, trace, largest) for block, trace in zip(blocks, traces)],
        blocks[row],
        head,
        taken(traces[row], head).tolist(),
        largest,
    )


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text: empty for all but the last part of a character."""
    stream = tokenizer.stream()
    texts = [stream.feed(token) for token in tokens]
    texts[-1] += stream.flush()
    return texts


def taken(trace: BlockTrace, head: int) -> Tensor:
    """How much of what token s put into a head's memory token t erased: [T, T], 0 for s >= t.

    Token s adds k_s u_s^T with u_s = z_s - e_s. What t erases is, by (9), the sum over s < t of
    c_ts u_s with c_ts = (b_t * k_t)^T Diag(alpha_{s+1} ... alpha_t) k_s; an entry is c_ts |u_s|.
    """
    alpha, key, along = (part[:, head].double() for part in (trace.alpha, trace.key, trace.along))
    put = (trace.write - trace.erase)[:, head].double().norm(dim=-1)
    out = torch.zeros(len(key), len(key), dtype=torch.float64)
    left = key.new_zeros(0, key.shape[1])  # earlier keys, each decayed until now
    for t in range(len(key)):
        left = left * alpha[t]
        out[t, :t] = (left @ along[t]) * put[:t]
        left = torch.cat([left, key[t : t + 1]])
    return out


def _block(block: int, trace: BlockTrace, largest: tuple[float, float]) -> BlockView:
    written, erased, faded = (part.norm(dim=-1).tolist() for part in (trace.written, trace.erased, trace.faded))
    nats = -trace.alpha.double().clamp(min=1e-300).log().mean(0)  # [HV, K]
    half_lives = [sorted(math.log(2) / n if n > 0 else math.inf for n in head) for head in nats.tolist()]
    return BlockView(
        block,
        written,
        erased,
        faded,
        half_lives,
        _histogram(trace.erase_gate, largest[0]),
        _histogram(trace.write_gate, largest[1]),
        _histogram(trace.alpha, 1.0),
    )


def _histogram(values: Tensor, highest: float) -> Histogram:
    counts = torch.histc(values.float(), BINS, 0, highest).int().tolist()
    return Histogram(counts, float(values.double().mean()))
