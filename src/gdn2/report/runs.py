"""Runs side by side: what they are, how they ended, what `gdn2 eval` found; runs that differ in their seed alone as
one, with mean and deviation. Repetitions with the same seed and settings stand apart: they are no spread over seeds.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from gdn2.config import RunConfig
from gdn2.evaluation.results import Result, conditions, place
from gdn2.model import LanguageModel
from gdn2.report.sources import Run
from gdn2.report.tables import Table, mean_and_deviation

NONE = "–"


@dataclass(frozen=True)
class Group:
    """Runs of one configuration and several seeds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> RunConfig:
        return self.runs[0].config


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """In the order of their first runs. A group of one run has its name."""
    found: dict[tuple[RunConfig, int], list[Run]] = {}
    times: Counter[RunConfig] = Counter()
    for run in runs:
        found.setdefault((replace(run.config, seed=0), times[run.config]), []).append(run)
        times[run.config] += 1
    return [
        Group(mine[0].name if len(mine) == 1 else f"{mine[0].name} and {len(mine) - 1} more seeds", tuple(mine))
        for mine in found.values()
    ]


def overview(groups: Sequence[Group]) -> Table:
    """A row for each group: the model, its training and the last validation."""
    heads = ("run", "bits per byte", "loss, nats", "mixer", "parameters", "lr", "tokens", "seeds", "tokens/s")
    rows = []
    for group in groups:
        config = group.config
        with torch.device("meta"):
            parameters = LanguageModel(config.model).num_parameters()
        rows.append(
            (
                group.name,
                _last(group, "val", "bits_per_byte", 4),
                _last(group, "val", "loss", 4),
                kind_of(config),
                f"{parameters:,}",
                f"{config.optim.lr:g}",
                _tokens(group),
                str(len(group.runs)),
                _last(group, "train", "tokens_per_second", 0),
            )
        )
    return Table("Runs, and their last validation", heads, tuple(rows))


def _tokens(group: Group) -> str:
    read = [row["tokens"] for run in group.runs for row in run.metrics]
    return f"{max(read):,}" if read else NONE  # a run that has just begun has no metrics


def kind_of(config: RunConfig) -> str:
    """The mixer, with what stands beside it in the cell."""
    cell = set(config.model.cell)
    if cell == {"attention"}:
        return "attention"
    return f"{config.model.mixer}, hybrid" if "attention" in cell else config.model.mixer


def gate_means(groups: Sequence[Group]) -> Table | None:
    """What gates and memories were at the last validation, means over layers; None without any. Mamba has no gates."""
    names = {
        "mean_erase": "erase",
        "mean_write": "write",
        "mean_decay": "kept by token",
        "saturated_erase": "erase at an end",
        "saturated_write": "write at an end",
        "state_rms": "memory, rms",
    }
    rows = []
    for group in groups:
        layers = [val[-1]["layers"] for run in group.runs if (val := run.rows("val")) and val[-1].get("layers")]
        if layers:
            means = [
                [sum(layer[name] for layer in run) / len(run) for run in layers if name in run[0]] for name in names
            ]
            rows.append((group.name, *(mean_and_deviation(values, 3) if values else NONE for values in means)))
    heads = ("run", *names.values())
    return Table("Gates and memories at the last validation, means over layers", heads, tuple(rows)) if rows else None


def evaluations(groups: Sequence[Group]) -> Table | None:
    """A row for each measure of `gdn2 eval`, a column for each group that has any; None without any."""
    measured = [(group, [measures(run.results.values()) for run in group.runs]) for group in groups]
    measured = [(group, found) for group, found in measured if any(found)]
    if not measured:
        return None
    names = dict.fromkeys(name for _, found in measured for results in found for name in results)
    rows = []
    for name in names:
        cells = []
        for _, found in measured:
            values = [results[name] for results in found if name in results]
            cells.append(mean_and_deviation(values, 2) if values else NONE)
        rows.append((name, *cells))
    return Table("gdn2 eval", ("measure", *(group.name for group, _ in measured)), tuple(rows))


def measures(results: Iterable[Result]) -> dict[str, float]:
    """Plain numbers out of eval.json, by name and unit, oldest first; names say all that makes two numbers
    incomparable. Where two results have a number in common, as a needle task at lengths of which some were asked again,
    the newer one counts."""
    found: dict[str, float] = {}
    for result in results:
        task, where, about = result["task"], place(result), conditions(result)
        if task == "perplexity":
            found[f"perplexity{where}{about}"] = result["perplexity"]
            if result["bits_per_byte"] is not None:
                found[f"bits per byte{where}{about}"] = result["bits_per_byte"]
        elif "lengths" in result:
            for length, percent in zip(result["lengths"], result["percent_by_length"]):
                found[f"{task}{place(result | {'lengths': [length]})}, %{about}"] = percent
        elif "percent" in result:
            found[f"{task}{where}, %{about}"] = result["percent"]
        else:  # of lm-evaluation-harness
            numbers = {name: value for name, value in result.items() if isinstance(value, float)}
            found |= {f"{task}, {name}{where}{about}": value for name, value in numbers.items()}
    return found


def _last(group: Group, kind: str, name: str, digits: int) -> str:
    rows = [found[-1] for run in group.runs if (found := run.rows(kind))]
    return mean_of([row.get(name) for row in rows], lambda values: mean_and_deviation(values, digits))


def mean_of(values: Sequence[float | None], shown: Callable[[list[float]], str]) -> str:
    """`shown` of the values that are numbers: null was not finite, or not measured."""
    numbers = [value for value in values if value is not None]
    return shown(numbers) if numbers else NONE
