"""What a report is made of: runs' folders and files of experiments' rows, found and read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdn2.config import RunConfig, read_config
from gdn2.evaluation import results
from gdn2.report.rows import check_row
from gdn2.training.metrics import read_metrics

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A training run: its metrics' rows and, where they are there, the results of `gdn2 eval`."""

    name: str
    path: Path
    config: RunConfig
    metrics: list[Row]
    results: dict[str, Row]

    def rows(self, kind: str) -> list[Row]:
        return [row for row in self.metrics if row["kind"] == kind]


@dataclass
class Sources:
    """Runs, and rows by experiment, each once."""

    runs: list[Run] = field(default_factory=list)
    rows: dict[str, dict[str, Row]] = field(default_factory=dict)


def read_sources(paths: Sequence[str | Path]) -> Sources:
    """Everything under the paths: a run's folder, a folder of runs and files of rows, or such a file itself.

    ValueError for a path with neither, and for a file that is not what it should be.
    """
    sources = Sources()
    for path in map(Path, paths):
        before = len(sources.runs), sum(map(len, sources.rows.values()))
        if path.is_file():
            _add_rows(sources, path)
        elif (path / "metrics.jsonl").is_file():
            _add_run(sources, path)
        elif path.is_dir():
            for child in sorted(path.iterdir()):
                if (child / "metrics.jsonl").is_file():
                    _add_run(sources, child)
                elif child.suffix == ".jsonl":
                    _add_rows(sources, child)
        else:
            raise ValueError(f"{str(path)!r} does not exist; expected a run's folder, or rows of an experiment")
        if (len(sources.runs), sum(map(len, sources.rows.values()))) == before:
            raise ValueError(f"{str(path)!r} holds nothing new to report; expected runs, or .jsonl rows of experiments")
    return sources


def _add_run(sources: Sources, path: Path) -> None:
    path = path.resolve()
    if any(run.path == path for run in sources.runs):
        return
    sources.runs.append(Run(path.name, path, read_config(path), read_metrics(path), results.read(path / "eval.json")))


def _add_rows(sources: Sources, path: Path) -> None:
    for row in read_rows(path).values():
        sources.rows.setdefault(row["experiment"], {})[row["key"]] = row


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a file by key; a last line cut off by a crash is left out. ValueError for any other line that is no
    row, or lacks what tables show."""
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            check_row(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: no row of an experiment: {error}") from error
        rows[row["key"]] = row
    return rows
