"""Rows of experiments (see docs/experiments.md), summarised over their seeds, and as tables.

All learning rates of a group that every one of its seeds has are compared, and the best one's rows are shown: by
accuracy on validation questions for memory tasks, by bits per byte of held-out text for language models.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from gdn2.report.rows import KINDS
from gdn2.report.tables import Table, mean_and_deviation, mean_and_interval

Row = dict[str, Any]
BASE = "gdn2"  # what the others are compared with
LR = "lr, of those tried"


@dataclass(frozen=True)
class Entry:
    """One model: its rows at each learning rate, one for each seed; the best rate; the rate of each row that failed."""

    group: tuple[Any, ...]
    mixer: str
    lr: float
    at: dict[float, list[Row]]
    failed: tuple[float, ...]

    @property
    def rows(self) -> list[Row]:
        """Those at the best rate."""
        return self.at[self.lr]

    @property
    def rates(self) -> list[float]:
        """All that were tried."""
        return sorted({*self.at, *self.failed})

    @property
    def first(self) -> Row:
        return self.rows[0]


def entries_of(
    rows: Sequence[Row], group: Callable[[Row], tuple[Any, ...]], badness: Callable[[Row], float]
) -> list[Entry]:
    """One entry for each group and mixer: the rate whose mean badness over its seeds is lowest, of those that all
    seeds of the entry have. Rows that failed are in none (see `failures`).

    ValueError for two rows of one group, mixer, rate and seed: they differ in a setting that no table shows, and would
    pass for two seeds.
    """
    found: dict[tuple, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    seen: dict[tuple, Row] = {}
    failed: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        if "failed" in row:
            failed[group(row), row["mixer"]].append(row["lr"])
            continue
        same = seen.setdefault((group(row), row["mixer"], row["lr"], row["seed"]), row)
        if same is not row:
            raise ValueError(
                f"rows {same['key']} and {row['key']} are both {row['mixer']}'s at learning rate {row['lr']:g}, seed "
                f"{row['seed']}, and differ in what tables do not show; report them apart"
            )
        found[group(row), row["mixer"]][row["lr"]].append(row)
    entries = []
    for (name, mixer), rates in found.items():
        most = max(map(len, rates.values()))
        whole = {rate: seeds for rate, seeds in rates.items() if len(seeds) == most}
        best = min(whole, key=lambda rate: fmean(map(badness, whole[rate])))
        entries.append(Entry(name, mixer, best, dict(rates), tuple(failed[name, mixer])))
    return entries


def failures(rows: Sequence[Row]) -> list[str]:
    """A sentence for each row whose training failed; it is in no entry, and so in no mean."""
    return [
        f"{_model_of(row)} at learning rate {row['lr']:g}, seed {row['seed']}, failed: {row['failed']}"
        for row in rows
        if "failed" in row
    ]


def _model_of(row: Row) -> str:
    if row["experiment"] == "memory":
        return f"{memory_title(_memory_group(row))}: {row['mixer']}"
    return f"{row['kind']} {row['mixer']}"


def memory_entries(rows: Sequence[Row]) -> list[Entry]:
    """Of the experiment "memory", by task, memory, steps of training, sequences a step, steps of warm-up, precision."""
    entries = entries_of(rows, _memory_group, lambda row: -fmean(answer["accuracy"] for answer in row["validation"]))
    _check_asked([(entry.group, row) for entry in entries for row in entry.rows], _loads)
    return entries


def _loads(row: Row) -> list[float]:
    return [answer["load"] for answer in row["by_load"]]


def _memory_group(row: Row) -> tuple[Any, ...]:
    run = row["run"]
    warm_up = run["optim"]["warmup_tokens"]
    return row["task"], tuple(row["memory"]), run["steps"], run["batch"], warm_up, run["precision"]


def language_entries(rows: Sequence[Row]) -> list[Entry]:
    """Of the experiment "language", by text, length of training, and kind of model."""
    entries = entries_of(
        rows,
        lambda row: (row["corpus"]["train_sha256"], row["config"]["train"]["tokens"], row["kind"]),
        lambda row: bits(row)[0],
    )
    _check_asked(
        [(entry.group[:2], row) for entry in entries for row in entry.rows],
        lambda row: [list(row["language"]), [(cell["task"], cell["length"]) for cell in row["needles"]]],
    )
    return entries


def _check_asked(found: Sequence[tuple[Any, Row]], asked: Callable[[Row], list[Any]]) -> None:
    """ValueError for two rows of one table, with its group each, that were not asked at the same loads or lengths."""
    first: dict[Any, Row] = {}
    for group, row in found:
        other = first.setdefault(group, row)
        if asked(row) != asked(other):
            raise ValueError(
                f"rows {other['key']} and {row['key']} belong in one table, and one was asked {asked(other)}, "
                f"the other {asked(row)}; report them apart"
            )


def bits(row: Row) -> list[float]:
    """Bits per byte of a language row, at the training length and beyond."""
    return [score["bits_per_byte"] for score in row["language"].values()]


def accuracies(entry: Entry) -> dict[int, list[float]]:
    """Percent right by load, of each seed."""
    by_load: dict[int, list[float]] = defaultdict(list)
    for row in entry.rows:
        for answer in row["by_load"]:
            by_load[answer["load"]].append(100 * answer["accuracy"])
    return by_load


def found(entry: Entry, task: str) -> dict[int, list[float]]:
    """Percent of a task's needles found by length, of each seed."""
    by_length: dict[int, list[float]] = defaultdict(list)
    for row in entry.rows:
        for cell in row["needles"]:
            if cell["task"] == task:
                by_length[cell["length"]].append(cell["found"])
    return by_length


def needle_tasks(entry: Entry) -> list[str]:
    return list(dict.fromkeys(cell["task"] for cell in entry.first["needles"]))


def memory_tables(entries: Sequence[Entry]) -> list[Table]:
    """A table for each task and memory: a row for each mixer, best first, a column for each load; then one of the
    differences to Gated DeltaNet-2, in the same order, and one of all learning rates."""
    tables, shown = [], []
    for group in dict.fromkeys(entry.group for entry in entries):
        mine = [(entry, accuracies(entry)) for entry in entries if entry.group == group]
        mine.sort(key=lambda pair: -fmean(map(fmean, pair[1].values())))
        shown += [entry for entry, _ in mine]
        loads = list(mine[0][1])
        tables.append(
            Table(
                f"{memory_title(group)}: accuracy in percent by load",
                ("mixer", *map(str, loads), "seeds", LR),
                tuple(
                    (entry.mixer, *(mean_and_deviation(by_load[load], 1) for load in loads), *training(entry))
                    for entry, by_load in mine
                ),
            )
        )

    def right(row: Row) -> float:
        return 100 * fmean(answer["accuracy"] for answer in row["by_load"])

    def name(entry: Entry) -> str:
        return f"{memory_title(entry.group)}: {entry.mixer}"

    title = "Percent right of Gated DeltaNet-2 less that of each mixer, mean over loads"
    tables += _differences(title, [("difference", right, 1)], shown, name)
    return tables + _every_rate("Percent right at each learning rate, mean over loads", [("%", right, 1)], shown, name)


def memory_title(group: tuple[Any, ...]) -> str:
    """What the group of a memory entry is called; a warm-up of a twentieth and float32 are not mentioned."""
    task, memory, steps, batch, warm_up, precision = group
    title = f"{task}, memory {' x '.join(map(str, memory))} a layer, {steps:,} steps of {batch}"
    title += f", warm-up of {warm_up:,}" if 20 * warm_up != steps else ""
    return title + (f", {precision}" if precision != "fp32" else "")


def language_tables(entries: Sequence[Entry]) -> list[Table]:
    """For each text and length of training a table of bits per byte, one of needles for each task, one of the
    differences to Gated DeltaNet-2, and one of all learning rates."""
    tables = []
    for text, tokens in dict.fromkeys(entry.group[:2] for entry in entries):
        mine = in_order([entry for entry in entries if entry.group[:2] == (text, tokens)])
        title = language_title((text, tokens))
        places = [f"windows of {int(length):,}" for length in mine[0].first["language"]]
        columns = [[[bits(row)[i] for row in entry.rows] for entry in mine] for i in range(len(places))]
        tables.append(_language_table(f"Bits per byte of held-out files; {title}", mine, places, columns, 4))
        for task in needle_tasks(mine[0]):
            lengths = list(found(mine[0], task))
            columns = [[found(entry, task)[length] for entry in mine] for length in lengths]
            samples = mine[0].first["needles"][0]["samples"]
            name = f"{task}, percent of {samples} found, by tokens of the prompt; {title}"
            tables.append(_language_table(name, mine, [f"{length:,}" for length in lengths], columns, 1))
        measures: list[Measure] = [("bits per byte", lambda row: bits(row)[0], 4)]
        measures += [(f"{task}, %", partial(_mean_found, task=task), 1) for task in needle_tasks(mine[0])]
        tables += _differences(
            f"Gated DeltaNet-2 less each model of its kind, needles as means over lengths; {title}",
            measures,
            mine,
            _kind_and_mixer,
        )
        heading = f"Each learning rate, bits per byte in windows of {int(next(iter(mine[0].first['language']))):,}"
        tables += _every_rate(f"{heading}, needles as means over lengths; {title}", measures, mine, _kind_and_mixer)
    return tables


def _kind_and_mixer(entry: Entry) -> str:
    return f"{entry.group[2]} {entry.mixer}"


def language_title(group: tuple[Any, ...]) -> str:
    """What the text and the length of training of a language entry's group are called."""
    text, tokens, *_ = group
    return f"text {str(text)[:8]}, {tokens:,} tokens each"


def _mean_found(row: Row, task: str) -> float:
    return fmean(cell["found"] for cell in row["needles"] if cell["task"] == task)


Measure = tuple[str, Callable[[Row], float], int]


def _differences(
    title: str, measures: Sequence[Measure], entries: Sequence[Entry], name: Callable[[Entry], str]
) -> list[Table]:
    """A table of the mean differences between Gated DeltaNet-2 and the others of its group, each with the half width
    of its 95 % interval over the seeds that both have; none where there is nothing to compare."""
    base = {entry.group: entry for entry in entries if entry.mixer == BASE}
    rows = []
    for entry in entries:
        if entry.mixer == BASE or entry.group not in base:
            continue
        mine = {row["seed"]: row for row in base[entry.group].rows}
        pairs = [(mine[row["seed"]], row) for row in entry.rows if row["seed"] in mine]
        if pairs:
            cells = (mean_and_interval([of(a) - of(b) for a, b in pairs], digits) for _, of, digits in measures)
            rows.append((name(entry), *cells, str(len(pairs))))
    heads = ("compared with", *(measure for measure, _, _ in measures), "seeds")
    return [Table(f"{title}; 95 % intervals", heads, tuple(rows))] if rows else []


def _every_rate(
    title: str, measures: Sequence[Measure], entries: Sequence[Entry], name: Callable[[Entry], str]
) -> list[Table]:
    """A table with a row for each rate of each entry; none where no entry has two."""
    rows = [
        (name(entry), f"{rate:g}", *(mean_and_deviation([of(row) for row in at], digits) for _, of, digits in measures),
         str(len(at)))
        for entry in entries if len(entry.at) > 1
        for rate, at in sorted(entry.at.items())
    ]  # fmt: skip
    heads = ("model", "lr", *(measure for measure, _, _ in measures), "seeds")
    return [Table(title, heads, tuple(rows))] if rows else []


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """By kind, and within a kind fewer bits first."""
    return sorted(
        entries,
        key=lambda entry: (KINDS.index(str(entry.group[2])), fmean(bits(row)[0] for row in entry.rows)),
    )


def _language_table(
    title: str, entries: Sequence[Entry], heads: list[str], columns: list[list[list[float]]], digits: int
) -> Table:
    return Table(
        title,
        ("model", *heads, "seeds", LR, "parameters"),
        tuple(
            (
                f"{entry.group[2]} {entry.mixer}",
                *(mean_and_deviation(column[i], digits) for column in columns),
                *training(entry),
                f"{entry.first['parameters'] / 1e6:.2f}M",
            )
            for i, entry in enumerate(entries)
        ),
    )


def training(entry: Entry) -> tuple[str, str]:
    """How many seeds; and the best learning rate of those that were tried, with the number of failed rows of each."""
    tried = []
    for rate in entry.rates:
        failed = entry.failed.count(rate)
        tried.append(f"{rate:g} ({failed} failed)" if failed else f"{rate:g}")
    return str(len(entry.rows)), f"{entry.lr:g} of {', '.join(tried)}"
