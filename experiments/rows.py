"""Rows of experiments: one JSON object a line, appended as soon as it is measured, found again by what it asked for."""

import argparse
import hashlib
import json
import subprocess
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import gdn2
from gdn2.report.experiments import failures
from gdn2.report.sources import read_rows
from gdn2.report.tables import Table

Row = dict[str, Any]


def key_of(setting: Row) -> str:
    """A short hash of everything that a row's numbers depend on, besides code and machine."""
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, Row]:
    """The rows of a file by key, none where there is no file."""
    return read_rows(path) if path.exists() else {}


def show(tables: Sequence[Table], found: Sequence[Row]) -> None:
    """Tables made from the rows, and which of them failed."""
    print("\n\n".join([*(table.markdown() for table in tables), *(f"{sentence}." for sentence in failures(found))]))


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_bytes().endswith(b"\n"):  # half a line of a run that died
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rfind(b"\n") + 1])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def code() -> Row:
    """Which code measures: the version, a hash of the sources as they are, and where there is git its commit, and
    whether the sources differ from it ("changed")."""
    source = Path(gdn2.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        digest.update(str(path.relative_to(source)).encode() + path.read_bytes())
    commit, changes = _git("rev-parse", "HEAD", at=source), _git("status", "--porcelain", ".", at=source)
    changed = None if commit is None else bool(changes)
    return {"version": gdn2.__version__, "commit": commit, "changed": changed, "source_sha256": digest.hexdigest()}


def _git(*arguments: str, at: Path) -> str | None:
    """What git says in a folder, None where there is no repository or no git."""
    try:
        said = subprocess.run(["git", *arguments], cwd=at, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return said.stdout.strip() if said.returncode == 0 else None


def machine(device: str) -> Row:
    """Where it is measured."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__}


def add_options(parser: argparse.ArgumentParser, sizes: Collection[str], experiment: str) -> None:
    """The options that every experiment has."""
    parser.add_argument("--size", choices=sizes, default="small")
    parser.add_argument("--out", type=Path, help=f"rows; else experiments/results/{experiment}-SIZE.jsonl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=float("inf"),
        help="no row but the first is begun that would not end within it, if it takes as long as the longest so far",
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows measured at once, each in a process of its own")
    parser.add_argument("--seeds", type=int, help="else the size's")
    parser.add_argument("--dry-run", action="store_true", help="count the rows, measured and missing")
    parser.add_argument("--summary", action="store_true", help="show the rows there are, measure none")


def check_names(parser: argparse.ArgumentParser, names: Sequence[str], known: Collection[str]) -> None:
    """End the program where a name is not known."""
    for name in names:
        if name not in known:
            parser.error(f"{name!r}; expected some of {', '.join(known)}")


def numbers(parser: argparse.ArgumentParser, option: str, text: str) -> tuple[float, ...]:
    """The comma-separated numbers above 0 of an option; ends the program where one is none."""
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            found.append(0.0)
        if not 0 < found[-1] < float("inf"):
            parser.error(f"{option} has {part!r}; expected numbers above 0, separated by commas")
    return tuple(found)


class Budget:
    """Whether another row may begin: the first ones, and those that would end in time if as long as the longest."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.began = time.perf_counter()
        self.longest = 0.0

    def spent(self) -> float:
        return time.perf_counter() - self.began

    def allows(self, left: int) -> bool:
        """Says so where it does not, with how many rows are left."""
        if self.longest == 0 or self.spent() + self.longest <= self.seconds:
            return True
        print(f"budget of {self.seconds:.0f} s nearly spent; the same command goes on with {left} rows", flush=True)
        return False

    def ended(self, began: float) -> None:
        """A row that began when this much was spent has ended."""
        self.longest = max(self.longest, self.spent() - began)


def work(
    settings: Sequence[Row],
    out: Path,
    options: argparse.Namespace,
    measure: Callable[[Row], Row],
    describe: Callable[[Row], str],
) -> list[Row]:
    """Measure the settings whose rows are not in `out`, in order, as far as the options say; the rows there are then.

    Each is appended as soon as it is there, with the code and the machine that measured it. `measure` is pickled where
    there are several jobs.
    """
    wanted = {key_of(setting): setting for setting in settings}
    measured = read(out)
    missing = [setting for key, setting in wanted.items() if key not in measured]
    print(f"{len(wanted)} rows, {len(missing)} missing in {out}", flush=True)
    if not (options.dry_run or options.summary):
        about = {"code": code(), **machine(options.device), "jobs": options.jobs}
        budget = Budget(options.budget_seconds)
        found = (
            _in_turn(missing, measure, budget)
            if options.jobs == 1
            else _side_by_side(missing, measure, budget, options.jobs)
        )
        for number, row in enumerate(found, 1):
            append(out, row | about)
            print(f"[{number}/{len(missing)}, {budget.spent():.0f} s] {describe(row)}", flush=True)
        measured = read(out)
    return [measured[key] for key in wanted if key in measured]


def _in_turn(settings: Sequence[Row], measure: Callable[[Row], Row], budget: Budget) -> Iterator[Row]:
    for number, setting in enumerate(settings):
        if not budget.allows(len(settings) - number):
            return
        began = budget.spent()
        row = measure(setting)
        budget.ended(began)
        yield row


def _side_by_side(settings: Sequence[Row], measure: Callable[[Row], Row], budget: Budget, jobs: int) -> Iterator[Row]:
    """Rows as they end, each measured in one of `jobs` processes of one thread each.

    Where one raises, no further row is begun, and the error is raised once those that run have ended and are given.
    """
    ahead = deque(settings)
    error = None
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        running: dict[Future[Row], float] = {}
        while ahead or running:
            while ahead and len(running) < jobs:
                if not budget.allows(len(ahead)):
                    ahead.clear()
                    break
                running[pool.submit(measure, ahead.popleft())] = budget.spent()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                budget.ended(running.pop(future))
                if (raised := future.exception()) is None:
                    yield future.result()
                else:
                    error = error or raised
                    ahead.clear()
    if error is not None:
        raise error
