"""What a run says about itself: metrics.jsonl, the terminal, validation, and the gates' statistics."""

import json
import math
import os
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import nn

from gdn2.data.disk import writing
from gdn2.data.shards import IGNORE, Batch, TokenBatches
from gdn2.layers.delta import DeltaMixer
from gdn2.layers.gates import Gates, OpenGates
from gdn2.layers.state import AttentionState
from gdn2.model import LanguageModel
from gdn2.training.distributed import Ranks
from gdn2.training.sharding import settle

Row = dict[str, Any]
LARGEST_NATS = 700  # exp of more is no float
SATURATED = 0.01  # a gate this close to either end of its range hardly passes gradients


def language_scores(nats: float, targets: int, text_bytes: float) -> Row:
    """Mean loss in nats per token, perplexity and bits per byte from sums over `targets` predicted tokens.

    Bits per byte are None where the targets hold no byte, as one end-of-text token alone.
    """
    loss = nats / targets
    perplexity = math.exp(loss) if loss < LARGEST_NATS else math.inf
    bits = nats / (math.log(2) * text_bytes) if text_bytes else None
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits}


@torch.no_grad()
def validate(
    model: LanguageModel,
    batches: TokenBatches,
    tokens: int,
    device: torch.device,
    autocast: AbstractContextManager,
    ranks: Ranks | None = None,
) -> Row:
    """Scores over about `tokens` validation tokens, and gate and state statistics of the first batch's layers.

    Ranks take turns with the batches; where they do not come out even, a batch is read again and not counted, since
    every rank must take part in every pass.
    """
    was_training = model.training
    model.eval()
    nats, targets, text_bytes, layers = 0.0, 0, 0.0, []
    windows = batches.spread(tokens)
    for first in range(0, len(windows), batches.world_size):
        place = first + batches.rank
        batch = batches.read(windows[place if place < len(windows) else 0])
        if place >= len(windows):
            batch.targets.fill_(IGNORE)
        batch = batch if ranks is None else ranks.own_tokens(batch)
        count = int((batch.targets != IGNORE).sum())
        text_bytes += batches.token_file.bytes_of(batch.targets)
        batch = batch.to(device)
        with autocast:
            nats += float(model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)) * count
            if first == 0:
                layers = layer_statistics(model, batch, ranks)
        targets += count
    model.train(was_training)
    if ranks is not None:
        settle(model, ranks)
        nats, all_targets, text_bytes = ranks.sum([nats, targets, text_bytes])
        targets = int(all_targets)
    return language_scores(nats, targets, text_bytes) | {"layers": layers}


@torch.no_grad()
def inspect(
    model: LanguageModel, batches: TokenBatches, device: torch.device, autocast: AbstractContextManager, ranks: Ranks
) -> list[Row]:
    """`layer_statistics` of one validation sequence, the same one every time."""
    was_training = model.training
    model.eval()
    with autocast:
        layers = layer_statistics(model, ranks.own_tokens(batches.read([0])).to(device), ranks)
    model.train(was_training)
    settle(model, ranks)
    return layers


@torch.no_grad()
def layer_statistics(model: nn.Module, batch: Batch, ranks: Ranks | None = None) -> list[Row]:
    """For each recurrent mixer, first to last, the root mean square of the memory after the batch's sequences; of a
    delta rule also means of erase, write and decay exp(g), and the share of erase and write gates within 0.01 of an end
    of their range (0 where they are fixed there, as linear attention's are).

    `batch` are this rank's tokens. Ranks with other heads or other tokens of the same sequences take part together, and
    all find what one process would.
    """
    seen: list[Row] = []

    def watch(mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
        gates = mixer.gates
        assert isinstance(gates, Gates)
        log_decay, erase, write = gates(inputs[0])
        share = (erase / gates.largest_erase, write / gates.largest_write)
        fixed = isinstance(gates, OpenGates)
        ends = [0.0 if fixed else float(((g < SATURATED) | (g > 1 - SATURATED)).float().mean()) for g in share]
        seen.append(
            {
                "mean_erase": float(erase.float().mean()),
                "mean_write": float(write.float().mean()),
                "mean_decay": 1.0 if log_decay is None else float(log_decay.float().exp().mean()),
                "saturated_erase": ends[0],
                "saturated_write": ends[1],
            }
        )

    with ExitStack() as hooks:
        if any(module._compiled_call_impl is not None for module in model.modules()):
            hooks.enter_context(torch.compiler.set_stance("force_eager"))  # hooks would be compiled in, every time anew
        for module in model.modules():
            if isinstance(module, DeltaMixer):
                hooks.callback(module.register_forward_pre_hook(watch).remove)
        _, states = model(batch.tokens, cu_seqlens=batch.cu_seqlens)
    memories = [state.memory for state in states if not isinstance(state, AttentionState)]
    if ranks is not None and ranks.parts is not None:
        memories = [ranks.parts.ended(memory, batch.cu_seqlens) for memory in memories]
    rows = seen or [{} for _ in memories]  # a model's recurrent mixers are of one kind
    sums = [[*row.values(), float(m.float().square().sum()), m.numel()] for row, m in zip(rows, memories, strict=True)]
    sums, parts = (sums, 1) if ranks is None else (ranks.sum_of_parts(sums), ranks.tensor * ranks.context)
    return [
        {name: total / parts for name, total in zip(row, means)} | {"state_rms": math.sqrt(squares / count)}
        for row, (*means, squares, count) in zip(rows, sums)
    ]


class MetricsFile:
    """metrics.jsonl: one JSON object a line, flushed as it is written; a number that is not finite becomes null."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, row: Row) -> None:
        """OSError, which names the file, where it cannot be written."""
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row), allow_nan=False) + "\n")

    def cut_after(self, step: int) -> None:
        """Drop the rows of later steps, and a half-written last line: a resumed run writes them again."""
        if not self._path.exists():
            return
        kept = [line for line, row in _whole_lines(self._path) if row["step"] <= step]
        temporary = self._path.with_name(f".{self._path.name}")
        with writing(self._path, temporary):
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, self._path)


def read_metrics(run_dir: Path) -> list[Row]:
    """The rows of a run. ValueError when there is no file of them, or a line is no row."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(run_dir)!r} holds no metrics.jsonl; expected the folder of a training run")
    return [row for _, row in _whole_lines(path)]


def _whole_lines(path: Path) -> list[tuple[str, Row]]:
    """The lines and the rows in them; a last line without its end is being written, or was when the run died."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of JSON: {error}") from error
        if not isinstance(row, dict) or not {"kind", "step"} <= row.keys():
            raise ValueError(f"{path}:{number}: no row of metrics; expected an object with kind and step")
        found.append((line.decode("utf-8"), row))
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Display:
    """The terminal's view: a live bar with loss, speed and time left, or plain lines when it is no terminal."""

    def __init__(self, steps: int, step: int, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self._steps = steps
        self._bar: Any = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            # On a narrow terminal the bar alone gives way; TextColumn never wraps.
            count = MofNCompleteColumn(table_column=Column(no_wrap=True))
            left = TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True))
            columns = (BarColumn(), count, TextColumn("{task.fields[note]}"), TextColumn("ETA"), left)
            self._bar = Progress(*columns, console=Console(file=self._stream, highlight=False))
            self._task = self._bar.add_task("train", total=steps, completed=step, note="")

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, row: Row) -> None:
        """One row of the metrics; on a terminal, training rows only change the bar. Layers are for the files alone."""
        if row["kind"] == "layers":
            return
        if self._bar is None:
            print(self._line(row), file=self._stream, flush=True)
        elif row["kind"] == "train":
            self._bar.update(self._task, note=f"loss {row['loss']:.4f}  {_speed(row)}")
        else:
            self._bar.console.print(self._line(row), markup=False)

    def _line(self, row: Row) -> str:
        head = f"step {row['step']}/{self._steps}  "
        if row["kind"] == "train":
            left = (self._steps - row["step"]) * row["elapsed"] / row["step"]
            scores = f"loss {row['loss']:.4f}  {_bits(row)}  {_speed(row)}"
            return f"{head}{scores}  lr {row['lr']:.2e}  grad {row['grad_norm']:.2f}  ETA {_clock(left)}"
        if row["kind"] == "val":
            scores = f"perplexity {row['perplexity']:.3f}  {_bits(row)}"
            return f"{head}validation: loss {row['loss']:.4f}  {scores}"
        if row["kind"] == "sample":
            return f"{head}sample: {row['prompt']}[...]{row['text']}"
        return f"{head}{row['event']}"


def _bits(row: Row) -> str:
    return "no bytes" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f} bits per byte"


def _speed(row: Row) -> str:
    return f"{row['tokens_per_second']:,.0f} tokens/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
