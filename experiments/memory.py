"""Experiment 1: accuracy against memory load, every mixer with the same memory.

    python experiments/memory.py --size full --device cuda --budget-seconds 600
    python experiments/memory.py --tasks overwrite --mixers gdn2,kda --seeds 5
    python experiments/memory.py --summary

A row is one small model, trained on one task and asked at several loads. The grid is seeds x tasks x memories x
learning rates x mixers, the mixers innermost: wherever the budget ends it, each has had the same. Rows are appended to
a file of JSON lines, with settings, seed, code, a hash of the questions, the training loss and the time; rows that are
there are skipped, so that the same command goes on. `--dry-run` counts them. All mixers have the same learning rates to
choose from; the summary takes for each the one that is best on validation questions, and shows the test questions, mean
and standard deviation over seeds.
"""

import argparse
import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import rows
import torch
from rows import Row
from variants import MIXERS, chosen

from gdn2.config import ModelConfig, OptimConfig
from gdn2.data.synthetic import MQAR, S5, Deletion, Overwrite, Parity, Sharing, SyntheticTask
from gdn2.report.experiments import memory_entries, memory_tables
from gdn2.training import TrainingError
from gdn2.training.tasks import TEST_SEED, TaskRun, train_task

USUAL = ("gdn2", "kda", "gdn", "deltanet", "linear", "mamba2", "mamba3")

TRACKING = ("parity", "s5-swaps")  # measured when asked for: what doubled erase gates are for


@dataclass(frozen=True)
class Size:
    """A grid: its tasks, the memories of a layer as (heads, channels of keys and of values), what is swept."""

    tasks: dict[str, SyntheticTask]
    memories: tuple[tuple[int, int], ...]
    rates: tuple[float, ...]
    seeds: int
    run: TaskRun
    width: int
    layers: int


SIZES = {
    "full": Size(
        tasks={
            "mqar": MQAR(vocab_size=512, noise=False),
            "overwrite": Overwrite(),
            "sharing": Sharing(),
            "deletion": Deletion(),
            "parity": Parity(),
            "s5-swaps": S5(swaps=True),
        },
        memories=((1, 16), (2, 32)),
        rates=(1e-3, 3e-3),
        seeds=3,
        run=TaskRun((4, 8, 16, 32), 5_000, 64, OptimConfig(warmup_tokens=250), (4, 8, 16, 32, 64), test_sequences=512),
        width=64,
        layers=2,
    ),
    "small": Size(
        tasks={"overwrite": Overwrite(keys=32, values=32, rewrites=3)},
        memories=((1, 32),),
        rates=(1e-2,),
        seeds=1,
        run=TaskRun((4,), 400, 32, OptimConfig(warmup_tokens=20)),
        width=64,
        layers=1,
    ),
}


def grid(size: Size, tasks: list[str], mixers: list[str]) -> Iterator[Row]:
    """The settings of every row, in the order in which they are measured."""
    for seed, task, (heads, channels), rate, mixer in product(
        range(size.seeds), tasks, size.memories, size.rates, mixers
    ):
        model = ModelConfig(
            vocab_size=size.tasks[task].vocab_size, d_model=size.width, num_layers=size.layers,
            mlp_width=size.width, num_heads=heads, key_dim=channels, value_dim=channels, **MIXERS[mixer],
        )  # fmt: skip
        run = replace(size.run, optim=replace(size.run.optim, lr=rate))
        yield {
            "experiment": "memory",
            "task": task,
            "task_settings": asdict(size.tasks[task]),  # type: ignore[call-overload]
            "mixer": mixer,
            "memory": [heads, channels, channels],
            "lr": rate,
            "seed": seed,
            "model": asdict(model),
            "run": asdict(run),
        }


def measure(setting: Row, size: Size, device: str) -> Row:
    """The row of a setting."""
    task = size.tasks[setting["task"]]
    run = replace(size.run, optim=replace(size.run.optim, lr=setting["lr"]))
    began = time.perf_counter()
    try:
        result = train_task(ModelConfig(**setting["model"]), task, run, setting["seed"], device)
    except TrainingError as error:  # a result too: the grid goes on, and the row says so
        result = {"failed": str(error)}
    spent = {"seconds": time.perf_counter() - began}
    return {"key": rows.key_of(setting), **setting, **result, **spent, "questions_sha256": questions(task, run, device)}


def questions(task: SyntheticTask, run: TaskRun, device: str) -> str:
    """A hash of the first test questions of every load."""
    digest = hashlib.sha256()
    for load in run.test_loads or run.loads:
        drawn = task.draw(load, run.batch, torch.Generator(device).manual_seed(TEST_SEED))
        for tensor in drawn:
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows.add_options(parser, list(SIZES), "memory")
    parser.add_argument("--tasks", help=f"of the size's, comma-separated; else all but {', '.join(TRACKING)}")
    parser.add_argument("--mixers", default=",".join(USUAL), help=f"some of {', '.join(MIXERS)}; or ablations")
    parser.add_argument("--steps", type=int, help="of each training; else the size's")
    parser.add_argument("--batch", type=int, help="sequences a step; else the size's")
    parser.add_argument("--warm-up", type=int, help="steps in which the learning rate rises; else the size's")
    parser.add_argument("--memories", help="of a layer, as heads x channels: 1x16,2x32; else the size's")
    parser.add_argument("--rates", help="learning rates, comma-separated; else the size's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    changes = {name: getattr(options, name) for name in ("steps", "batch") if getattr(options, name)}
    optim = size.run.optim
    if options.warm_up is not None:
        optim = replace(optim, warmup_tokens=options.warm_up)  # of a TaskRun, in steps
    size = replace(size, run=replace(size.run, precision=options.precision, optim=optim, **changes))
    if options.memories:
        size = replace(size, memories=tuple(memory_of(parser, text) for text in options.memories.split(",")))
    if options.rates:
        size = replace(size, rates=rows.numbers(parser, "--rates", options.rates))
    size = replace(size, seeds=options.seeds or size.seeds)
    usual = [task for task in size.tasks if task not in TRACKING]
    tasks, mixers = options.tasks.split(",") if options.tasks else usual, chosen(options.mixers)
    rows.check_names(parser, tasks, size.tasks)
    rows.check_names(parser, mixers, MIXERS)
    out = options.out or Path(__file__).parent / "results" / f"memory-{options.size}.jsonl"
    settings = list(grid(size, tasks, mixers))
    measured = rows.work(settings, out, options, partial(measure, size=size, device=options.device), describe)
    if not options.dry_run:
        rows.show(memory_tables(memory_entries(measured)), measured)


def memory_of(parser: argparse.ArgumentParser, text: str) -> tuple[int, int]:
    """Heads and channels out of "2x32"; ends the program where it is none."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        parser.error(f"--memories has {text!r}; expected heads x channels, such as 2x32")
    return int(parts[0]), int(parts[1])


def describe(row: Row) -> str:
    """One line about a row."""
    name = f"{row['task']} {row['mixer']} {row['memory']} lr {row['lr']:g} seed {row['seed']}"
    if "failed" in row:
        return f"{name}: {row['failed']}"
    found = " ".join(f"{entry['load']}:{entry['accuracy']:.3f}" for entry in row["by_load"])
    return f"{name}: {found}"


if __name__ == "__main__":
    main()
