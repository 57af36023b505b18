"""What generation costs: a step at several batch sizes, the first token, and memory, against the length of the context.

    python benchmarks/gpu_generate.py --json rows.jsonl
    python benchmarks/gpu_generate.py --rows 'step:gdn2-1.3b:*' 'first:*'
    python benchmarks/gpu_generate.py --device cpu --models gdn2-tiny transformer-full-tiny --batches 1 2
    python benchmarks/gpu_generate.py --rows 'step:gdn2-1.3b:1' --set project.MOST_ROWS=0

Models have random weights, in bfloat16 on a GPU; PRESET+int8 and PRESET+fp8 hold the large ones in 8 bits. Every row
is printed when it is measured, and appended to FILE. Rows:

    copy                    bytes per second of a copy on this device, reads and writes counted: the floors' bandwidth
    step:MODEL:BATCH        one decoding step of that many texts, from a CUDA graph, each step reading the one before;
                            floor: the time to read the weights once and the states once (memories: and to write them);
                            all texts have --context tokens behind them
    kernels:MODEL:BATCH     the kernels of such a step on a GPU: how often, microseconds of all of them, name; busy_us
                            is the time in which any ran: kernels that begin early run beside each other; and the first
                            ones in their order: when, how long, name
    narrow:MODEL:BATCH      the same as step with memories in bfloat16; recurrent models alone
    context:MODEL:LENGTH    the same of one text with that many tokens behind it
    text:MODEL              tokens/s of `gdn2.generate.generate`, greedy and sampled, one text
    first:MODEL:LENGTH      seconds to the first token of a prompt, read in chunks
    memory:MODEL:CONTEXT    bytes of state of one text after that many tokens (from shapes), and where it was really
                            read (--read at most): bytes that the state takes, and the peak beyond weights while reading

--list shows the rows that a command would measure. --set gives constants of gdn2.ops.kernels another value, to see what
they are worth: project.MOST_ROWS=0 takes the library's products, early.NEXT=0 lets no kernel begin early.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gdn2 import LanguageModel, preset
from gdn2.decoding import DecodeStep
from gdn2.generate import generate
from gdn2.inference import Session
from gdn2.layers import AttentionState
from gdn2.layers.state import state_bytes, with_room

MODELS = ["gdn2-1.3b", "gdn2-hybrid-1.3b", "transformer-1.3b", "transformer-full-1.3b"]
MODELS += ["gdn2-1.3b+int8", "gdn2-1.3b+fp8"]
Row = dict[str, Any]


class Clock:
    """Seconds on a device: from events on a GPU, by waiting elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start


def copy_rate(clock: Clock, size: int) -> float:
    x = torch.empty(size, dtype=torch.uint8, device=clock.device)
    y = torch.empty_like(x)
    repeats = 10

    def copies() -> None:
        for _ in range(repeats):
            y.copy_(x)

    copies()
    return 2 * size * repeats / min(clock.seconds(copies) for _ in range(5))


def build(name: str, device: torch.device) -> LanguageModel:
    """The preset with random weights; in bfloat16 on a GPU."""
    torch.manual_seed(0)
    name, _, kind = name.partition("+")
    with torch.device("meta"):
        model = LanguageModel(preset(name))
    if device.type == "cuda":
        model.to(torch.bfloat16)
    model.to_empty(device=device).reset_parameters()
    return (model.quantize(kind) if kind else model).eval()


def weight_bytes(model: LanguageModel) -> int:
    """Of all weights that a step reads whole: not the embedding, of which it reads a row a text, unless it is tied."""
    skipped = 0 if model.head is None else model.embedding.weight.nbytes
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - skipped


def state_traffic(step: DecodeStep, context: int) -> int:
    """Bytes of state that a step must move: keys and values are read, everything else is read and written."""
    moved = 0
    for block in step.state:
        bytes_ = sum(tensor.nbytes for tensor in block)
        if isinstance(block, AttentionState):  # full attention has more room than tokens
            moved += bytes_ * min(context, block.keys.shape[1]) // block.keys.shape[1]
        else:
            moved += 2 * bytes_
    return moved


@torch.inference_mode()
def step_row(
    model: LanguageModel, clock: Clock, rate: float, batch: int, context: int, memory: torch.dtype | None = None
) -> Row:
    step = DecodeStep(model, batch, memory_dtype=memory)
    step.make_room(context + 1)
    for block in step.state:
        if isinstance(block, AttentionState):
            block.position.fill_(context)
    steps = 16
    tokens = torch.randint(0, model.config.vocab_size, (batch,), device=clock.device)

    def run(count: int) -> None:
        step(tokens)
        for _ in range(count - 1):
            step(step.likeliest)

    run(steps)
    seconds = statistics.median(clock.seconds(lambda: run(steps)) / steps for _ in range(5))
    weights, states = weight_bytes(model), state_traffic(step, context)
    floor = (weights + states) / rate
    return {
        "context": context, "ms": seconds * 1e3, "tokens_per_s": batch / seconds, "graph": step.graph,
        "weight_GB": weights / 1e9, "state_GB": states / 1e9, "state_TBps": states / seconds / 1e12,
        "floor_ms": floor * 1e3, "weight_floor_ms": weights / rate * 1e3, "of_floor": floor / seconds,
        "of_weight_floor": weights / rate / seconds,
    }  # fmt: skip


@torch.inference_mode()
def kernels_row(model: LanguageModel, clock: Clock, rate: float, batch: int, context: int) -> Row:
    step, steps = DecodeStep(model, batch), 4
    step.make_room(context + 1)
    tokens = torch.zeros(batch, dtype=torch.int64, device=clock.device)
    for _ in range(steps):
        step(tokens)
    clock.wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step(tokens)
        clock.wait()
    times: dict[str, list[float]] = {}
    busy, until = 0.0, float("-inf")
    events = [e for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    for event in events:
        begin, end = event.time_range.start, event.time_range.end
        times.setdefault(event.name, []).append(end - begin)
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    kernels = [[len(us) / steps, round(sum(us) / steps, 1), name[:80]] for name, us in times.items()]
    kernels.sort(key=lambda kernel: -kernel[1])
    last = [(e.time_range.start, e.time_range.end, e.name) for e in events[-(len(events) // steps) :]]
    first = [[round(begin - last[0][0], 1), round(end - begin, 1), name[:40]] for begin, end, name in last[:16]]
    return {"count": len(events) / steps, "busy_us": busy / steps, "kernels": kernels, "first": first}


def text_row(model: LanguageModel, clock: Clock, rate: float, tokens: int) -> Row:
    row: Row = {"tokens": tokens}
    for name, settings in (("greedy", {"temperature": 0.0}), ("sampled", {"temperature": 0.8, "top_p": 0.9})):
        steps = generate(model, [[1, 2, 3]], tokens + 1, seed=0, **settings)
        next(steps)
        next(steps)  # the first step makes the graph
        row[f"{name}_tokens_per_s"] = (tokens - 1) / clock.seconds(partial(list, steps))
    return row


def prompt(model: LanguageModel, length: int) -> list[int]:
    seeded = torch.Generator().manual_seed(length)
    return torch.randint(0, model.config.vocab_size, (length,), generator=seeded).tolist()


def first_row(model: LanguageModel, clock: Clock, rate: float, length: int, chunk: int) -> Row:
    # Compiles: a first chunk, and one that goes on from a state.
    next(generate(model, [prompt(model, min(length, 2 * chunk))], 1, temperature=0, chunk=chunk))
    tokens = prompt(model, length)
    seconds = clock.seconds(lambda: next(generate(model, [tokens], 1, temperature=0, chunk=chunk)))
    return {"chunk": chunk, "seconds": seconds, "prompt_tokens_per_s": length / seconds}


def memory_row(model: LanguageModel, clock: Clock, rate: float, context: int, chunk: int, read: int) -> Row:
    """State by shape; and read for real up to `read` tokens."""
    full = model.config.window is None and "attention" in model.config.layer_kinds
    shapes = model.initial_state(1, device="meta")
    row: Row = {"state_bytes": state_bytes(with_room(shapes, context) if full else shapes)}
    if context > read:
        return row
    cuda = clock.device.type == "cuda"
    if cuda:
        clock.wait()
        torch.cuda.reset_peak_memory_stats(clock.device)
        before = torch.cuda.memory_allocated(clock.device)
    session = Session(model, chunk, keep=0)
    session.read(prompt(model, context))
    row["measured_state_bytes"] = state_bytes(session.snapshot().state)
    if cuda:
        row["kept_bytes"] = torch.cuda.memory_allocated(clock.device) - before
        row["peak_bytes"] = torch.cuda.max_memory_allocated(clock.device) - before
    return row


def plan(options: argparse.Namespace) -> list[tuple[str, str, Callable[..., Row]]]:
    """Name, model and measurement of every row that is wanted; a model's rows lie together."""
    rows: list[tuple[str, str, Callable[..., Row]]] = []
    for model in options.models:
        config = preset(model.partition("+")[0])
        attention, recurrent = "attention" in config.layer_kinds, "mixer" in config.layer_kinds
        limit = options.attention_read if attention else max(options.read, *options.lengths)
        full = attention and config.window is None
        for batch in options.batches:
            rows.append((f"step:{model}:{batch}", model, partial(step_row, batch=batch, context=options.context)))
            if options.device.startswith("cuda"):
                measure = partial(kernels_row, batch=batch, context=options.context)
                rows.append((f"kernels:{model}:{batch}", model, measure))
            if recurrent and "+" not in model:
                measure = partial(step_row, batch=batch, context=options.context, memory=torch.bfloat16)
                rows.append((f"narrow:{model}:{batch}", model, measure))
        if "+" in model:
            continue
        for context in options.contexts:
            rows.append((f"context:{model}:{context}", model, partial(step_row, batch=1, context=context)))
        rows.append((f"text:{model}", model, partial(text_row, tokens=options.tokens)))
        for length in options.lengths:
            if not full or length <= limit:
                measure = partial(first_row, length=length, chunk=options.chunk)
                rows.append((f"first:{model}:{length}", model, measure))
        for context in options.contexts:
            measure = partial(memory_row, context=context, chunk=options.chunk, read=min(limit, options.read))
            rows.append((f"memory:{model}:{context}", model, measure))
    return [row for row in rows if any(fnmatchcase(row[0], pattern) for pattern in options.rows)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["*"], help="names of rows, * and ? standing for anything")
    parser.add_argument("--json", type=Path, help="append each row to this file, one JSON object a line")
    parser.add_argument("--list", action="store_true", help="show the rows' names and measure nothing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=MODELS, help="presets")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=8_192, help="tokens that full attention has read in step rows")
    parser.add_argument("--tokens", type=int, default=256, help="of the text rows")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4_096, 32_768, 262_144], help="of prompts")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1_024, 32_768, 1_048_576], help="of memory rows")
    parser.add_argument("--read", type=int, default=1_048_576, help="longest context that memory rows really read")
    parser.add_argument(
        "--attention-read", type=int, default=32_768, help="the same for attention, and full attention's longest prompt"
    )
    parser.add_argument("--chunk", type=int, default=8_192, help="prompt tokens read at once")
    parser.add_argument("--copy", type=int, default=2**30, help="bytes of the copy that measures the bandwidth")
    parser.add_argument("--set", nargs="+", default=[], metavar="MODULE.NAME=INTEGER", help="constants of the kernels")
    return parser.parse_args(arguments)


def set_constant(wanted: str) -> None:
    """Give a constant of gdn2.ops.kernels the value in MODULE.NAME=INTEGER."""
    try:
        path, value = wanted.split("=")
        module, name = path.split(".")
        holder = importlib.import_module(f"gdn2.ops.kernels.{module}")
        getattr(holder, name)
        setattr(holder, name, int(value))
    except (ValueError, AttributeError, ModuleNotFoundError) as error:
        expected = "MODULE.NAME=INTEGER, such as project.MOST_ROWS=0"
        raise SystemExit(f"--set {wanted}: {error}; expected {expected}") from None


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    chosen = plan(options)
    if options.list:
        print(*(name for name, _, _ in chosen), sep="\n")
        return
    if not chosen:
        raise SystemExit(f"no row is called {' or '.join(options.rows)}; --list shows the names")
    for wanted in options.set:
        set_constant(wanted)
    device = torch.device(options.device)
    clock = Clock(device)

    def say(row: Row) -> None:
        line = json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
        print(line, flush=True)
        if options.json:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    rate = copy_rate(clock, options.copy)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    say({"row": "copy", "device": name, "torch": torch.__version__, "TBps": rate / 1e12})
    model, built = None, ""
    for row, wanted, measure in chosen:
        if wanted != built:
            model = None  # the one before makes room first
            model, built = build(wanted, device), wanted
        start = time.perf_counter()
        try:
            found = measure(model, clock, rate)
        except torch.cuda.OutOfMemoryError as error:
            found = {"out_of_memory": str(error).split(". ")[0]}
        say({"row": row, **found, "took_s": time.perf_counter() - start})
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
