"""Training speed of a preset on random tokens, optimizer step included, on one device or several.

    python benchmarks/training.py --preset gdn2-hybrid-1.3b --seq-len 4096 --batch 4 --steps 10 --compile [--json FILE]
    python benchmarks/training.py --sizes 2048x8,4096x4,8192x2,16384x1 --operator fla --steps 5
    torchrun --nproc-per-node 2 benchmarks/training.py --preset gdn2-hybrid-1.3b --seq-len 4096 --batch 4

Settings of the configuration may follow, such as train.recompute=selective parallel.replicas=2 parallel.context=2. The
code is that of `gdn2 train`: sharding, micro-batches, clipping and AdamW; no data is read, nothing is saved. One line
of JSON for each size: tokens per second, milliseconds of a step (the median, the slowest rank's), MFU (recomputation
not counted) and the largest memory that a rank allocated. The first `--warm-up` steps, which compile and tune, are not
counted; `compilations` counts those of torch.compile in the steps that are, and should be 0. With `--profile` times are
those of a profiled run, somewhat longer.

`--operator fla` puts flash-linear-attention's `chunk_gdn2`, where that is installed, in the place of our operator in
every Gated DeltaNet-2 layer. It takes activated gates and normalised queries and keys, which torch operations and our
fused norm make; all else stays.
"""

import argparse
import gc
import json
import math
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from gdn2.config import load_run
from gdn2.data import Batch
from gdn2.info import describe
from gdn2.model import LanguageModel
from gdn2.presets import preset
from gdn2.training.compiling import compile_blocks
from gdn2.training.device import resolve_device
from gdn2.training.distributed import Ranks
from gdn2.training.optim import build_optimizer
from gdn2.training.parallel import check_parallel, parallelize
from gdn2.training.recompute import recompute
from gdn2.training.sharding import clip_gradients
from gdn2.training.step import accumulate_gradients
from gdn2.training.throughput import mfu, peak_flops


class RandomTokens:
    """Stands for a file of tokens, which are of no text."""

    def __init__(self, config, ranks):
        self._shape, self._words = (ranks.micro_batch, config.data.seq_len + 1), config.model.vocab_size
        self._source = torch.Generator().manual_seed(ranks.data_rank)

    def __next__(self):
        rows = torch.randint(self._words, self._shape, generator=self._source)
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None)

    def bytes_of(self, targets):
        return 0.0


def take_fla():
    """Give every Gated DeltaNet-2 layer flash-linear-attention's operator."""
    from fla.ops.gdn2 import chunk_gdn2

    from gdn2.layers import GatedDeltaNet2
    from gdn2.layers.norm import l2_norm

    def operator(*operands, initial_state, output_final_state, cu_seqlens):
        return chunk_gdn2(*operands, cu_seqlens=cu_seqlens)[0], None

    def rule(layer, q, k, v, x):
        return operator, (l2_norm(q), l2_norm(k), v, *layer.gates(x))

    GatedDeltaNet2.rule = rule


def sizes_of(text):
    """(length, batch) of each LENGTHxBATCH in a list."""
    try:
        pairs = [tuple(map(int, size.split("x"))) for size in text.split(",")]
    except ValueError:
        pairs = [()]
    if not all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}; expected LENGTHxBATCH, several with commas, as 4096x4,8192x2")
    return pairs


def configure(args, world):
    """The configuration: `--batch` sequences a step for each rank that reads data, in micro-batches of as many."""
    settings = [
        f"preset={args.preset}",
        f"data.seq_len={args.seq_len}",
        f"train.compile={args.compile}",
        *args.settings,
    ]
    first = load_run(None, [*settings, "train.micro_batch=1", f"train.batch_tokens={args.seq_len}"], preset)
    replicas, shards, *_ = first.parallel.sizes(world)
    tokens = args.seq_len * args.batch * replicas * shards
    sizes = [f"train.micro_batch={args.micro_batch or args.batch}", f"train.batch_tokens={tokens}"]
    return load_run(None, [*settings, *sizes, f"train.tokens={tokens}"], preset)


def measure(args):
    """A row of results, the same on every rank."""
    config = configure(args, int(os.environ.get("WORLD_SIZE", "1")))
    with Ranks(config) as ranks:
        check_parallel(config, ranks.size)
        device, autocast, precision = resolve_device(ranks.on_own_device(config))
        ranks.start(device)
        torch.manual_seed(config.seed)
        model = LanguageModel(config.model)
        parameters = model.num_parameters()
        parallelize(model, ranks, device, precision)
        optimizer = build_optimizer(model, config.optim)
        recompute(model, config.train.recompute)
        if config.train.compile:
            compile_blocks(model)
        tokens, losses, times = RandomTokens(config, ranks), [], []

        def step():
            batches = [next(tokens) for _ in range(ranks.sequences // ranks.micro_batch)]
            nats, targets, _ = accumulate_gradients(model, batches, tokens, ranks, device, autocast)
            clip_gradients(model, config.optim.clip or math.inf, ranks)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(nats / targets)

        for _ in range(args.warm_up):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = compilations()
        with profiler(args.profile if ranks.main else None, device):
            for _ in range(args.steps):
                synchronize(device)
                ranks.barrier()
                began = time.perf_counter()
                step()
                synchronize(device)
                ranks.barrier()  # the step is over when the slowest rank is done
                times.append(time.perf_counter() - began)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        most = max(ranks.gather(memory))
        seconds = statistics.median(times)
        speed = config.train.batch_tokens / seconds
        share = mfu(speed / ranks.size, describe(config.model, config.data.seq_len).training_flops, peak_flops(device))
        return ranks.main, {
            "preset": args.preset, "settings": args.settings, "parameters": parameters, "seq_len": args.seq_len,
            "batch": args.batch, "micro_batch": ranks.micro_batch, "compile": args.compile,
            "compilations": compilations() - before, "operator": args.operator, "precision": precision,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "processes": ranks.size,
            "torch": torch.__version__, "steps": args.steps, "tokens_per_second": round(speed, 1),
            "tokens_per_second_per_process": round(speed / ranks.size, 1), "step_ms": round(seconds * 1e3, 2),
            "mfu": None if share is None else round(share, 4), "peak_memory_gib": round(most / 2**30, 2),
            "first_loss": losses[0], "last_loss": losses[-1],
        }  # fmt: skip


def compilations():
    """Graphs that torch.compile has made so far in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def forget():
    """Free the model before, and what was compiled for its sizes, which would make those of the next one dynamic."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def profiler(path, device):
    """Writes where the time of rank 0 goes, a table, when a file for it is named."""
    if path is None:
        return nullcontext()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    order = f"self_{device.type}_time_total"

    def write(profile):
        path.write_text(profile.key_averages().table(sort_by=order, row_limit=40))

    return torch.profiler.profile(activities=kinds, on_trace_ready=write)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gdn2-hybrid-1.3b")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step for each rank that reads data")
    parser.add_argument("--micro-batch", type=int, help="sequences of a forward and backward pass; all of the batch")
    parser.add_argument(
        "--sizes", type=sizes_of, help="LENGTHxBATCH,... measured one after the other, in place of both"
    )
    parser.add_argument("--operator", choices=("ours", "fla"), default="ours", help="of Gated DeltaNet-2 layers")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--profile", type=Path, help="write a table of the operations' times of rank 0 here")
    parser.add_argument("--json", type=Path, help="append the row to this file too")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args(arguments)
    if args.operator == "fla":
        take_fla()
    sizes, rows = args.sizes or [(args.seq_len, args.batch)], []
    if len(sizes) > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error(f"--sizes names {len(sizes)} sizes; expected one with several processes")
    for length, batch in sizes:
        args.seq_len, args.batch = length, batch
        forget()
        writes, row = measure(args)
        rows.append(row)
        if writes:
            print(json.dumps(row), flush=True)
        if writes and args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return rows


if __name__ == "__main__":
    main()
