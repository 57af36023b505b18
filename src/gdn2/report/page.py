"""The report as one HTML page: styles, pictures and tables inside, nothing from elsewhere, no script."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import count
from statistics import fmean
from typing import Any

from gdn2.report import experiments, pictures, runs
from gdn2.report.experiments import Entry
from gdn2.report.memory import MemoryView
from gdn2.report.sources import Row, Run, Sources
from gdn2.report.svg import Series, heat, lines
from gdn2.report.tables import Table

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MOST_POINTS = 200  # of a curve, or twice as many
FIFTHS = ("0–20 %", "20–40 %", "40–60 %", "60–80 %", "80–100 %")


def page(sources: Sources, views: Sequence[tuple[str, MemoryView]], title: str = "gdn2 report") -> str:
    """HTML of everything that was read; `views` are memory views with the names of their runs."""
    number = count(1)
    sections = [*_runs(sources.runs, number), *_experiments(sources.rows, number), *_memories(views, number)]
    css = files("gdn2.report").joinpath("page.css").read_text(encoding="utf-8")
    contents = "".join(f'<li><a href="#{name}">{escape(head)}</a></li>' for name, head, _ in sections)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{escape(head)}</h2>\n{html}\n</section>'
        for name, head, html in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n'
        f'<main>\n<header><h1>{escape(title)}</h1>\n<nav aria-label="Contents"><ol>{contents}</ol></nav></header>\n'
        f"{body}\n</main>\n</body>\n</html>\n"
    )


Section = tuple[str, str, str]


def _runs(found: Sequence[Run], number: "count[int]") -> list[Section]:
    if not found:
        return []
    groups = runs.groups_of(found)
    parts = [table(runs.overview(groups), number)]
    parts += [table(t, number) for t in (runs.gate_means(groups), runs.evaluations(groups)) if t is not None]
    curves = []
    for kind, name in (("train", "training"), ("val", "validation")):
        drawn = [group for group in groups if all(len(run.rows(kind)) > 1 for run in group.runs)]
        series = [Series(g.name, later(mean_curve([run.rows(kind) for run in g.runs]))) for g in drawn]
        words = f"Bits per byte of {name} text, from a twentieth of training on"
        curves.append(figure(words, lines(words, series, "tokens", "bits per byte")))
    parts.append(grid(curves))
    maps = []
    for run in found:
        for name, result in run.results.items():
            if result.get("depths"):
                maps.append(
                    figure(
                        f"{run.name}: {name}; percent found",
                        heat(
                            f"{name}, of {run.name}: percent found by depth and length",
                            list(zip(*result["grid"])),
                            [f"{depth:g} %" for depth in result["depths"]],
                            [f"{length:,}" for length in result["lengths"]],
                            "depth",
                            "tokens",
                        ),
                    )
                )
    return [("runs", "Runs", "\n".join([*parts, grid(maps)]))]


def _experiments(rows: dict[str, dict[str, Any]], number: "count[int]") -> list[Section]:
    sections = []
    styles = {
        name: i for i, name in enumerate(sorted({row["mixer"] for part in rows.values() for row in part.values()}))
    }
    if "memory" in rows:
        found = list(rows["memory"].values())
        entries = experiments.memory_entries(found)
        charts = []
        for group in dict.fromkeys(entry.group for entry in entries):
            mine = [(entry, experiments.accuracies(entry)) for entry in entries if entry.group == group]
            series = [
                Series(e.mixer, [(load, fmean(seeds)) for load, seeds in by.items()], styles[e.mixer]) for e, by in mine
            ]
            name = experiments.memory_title(group)
            charts.append(figure(name, accuracy(name, series)))
        tables = [table(t, number) for t in experiments.memory_tables(entries)]
        sections.append(("memory-tasks", "Experiment: memory", "\n".join([grid(charts), *_failures(found), *tables])))
    if "language" in rows:
        found = list(rows["language"].values())
        entries = experiments.language_entries(found)
        parts = [*_failures(found), *(table(t, number) for t in experiments.language_tables(entries))]
        sections.append(("language", "Experiment: language and needles", "\n".join([_curves(entries, styles), *parts])))
        sections.append(("needles", "Needles by depth and length", _needles(entries)))
    return sections


def _failures(rows: Sequence[Row]) -> list[str]:
    return [f"<p>{escape(sentence)}.</p>" for sentence in experiments.failures(rows)]


def accuracy(name: str, series: Sequence[Series]) -> str:
    return lines(f"Accuracy by load: {name}", series, "load", "percent right", log_x=True, high_first=True)


def _curves(entries: Sequence[Entry], styles: dict[str, int]) -> str:
    """Training curves by text, length of training and kind of model, means over seeds."""
    charts = []
    for group in dict.fromkeys(entry.group for entry in entries):
        mine = [entry for entry in entries if entry.group == group]
        drawn = [entry for entry in mine if len(entry.first["loss"]) > 1]
        series = [Series(e.mixer, later(mean_curve([row["loss"] for row in e.rows])), styles[e.mixer]) for e in drawn]
        name = (
            f"{group[2]} models: bits per byte of training text, from a twentieth of training on; "
            f"{experiments.language_title(group)}"
        )
        charts.append(figure(name, lines(name, series, "tokens", "bits per byte")))
    return grid(charts)


Points = list[tuple[float, float | None]]


def mean_curve(seeds: Sequence[Sequence[Row]]) -> Points:
    """Bits per byte by tokens, the mean over seeds; None where one of them has no number."""
    points: Points = []
    for step in zip(*seeds):
        found = [row["bits_per_byte"] for row in step]
        points.append((step[0]["tokens"], None if None in found else fmean(found)))
    return points


def later(points: Points) -> Points:
    """Without the first twentieth, whose steep fall would hide all else; every so many, the last among them."""
    kept = [point for point in points if point[0] >= points[-1][0] / 20]
    return kept[:: -max(1, len(kept) // MOST_POINTS)][::-1]


def _needles(entries: Sequence[Entry]) -> str:
    parts = []
    for text, tokens in dict.fromkeys(entry.group[:2] for entry in entries):
        mine = experiments.in_order([entry for entry in entries if entry.group[:2] == (text, tokens)])
        for task in experiments.needle_tasks(mine[0]):
            maps = [figure(f"{entry.group[2]} {entry.mixer}", _by_depth(entry, task)) for entry in mine]
            title = f"{task}, percent found of all seeds' questions; {experiments.language_title((text, tokens))}"
            parts.append(f"<details open><summary>{escape(title)}</summary>{grid(maps, small=True)}</details>")
    return "\n".join(parts)


def _by_depth(entry: Entry, task: str) -> str:
    lengths = list(experiments.found(entry, task))
    cells = [[[0, 0] for _ in lengths] for _ in FIFTHS]
    for row in entry.rows:
        for cell in row["needles"]:
            if cell["task"] == task:
                for fifth, (found, asked) in enumerate(cell["by_depth"]):
                    sums = cells[fifth][lengths.index(cell["length"])]
                    sums[0] += found
                    sums[1] += asked
    values = [[100 * found / asked if asked else None for found, asked in row] for row in cells]
    label = f"{task} of {entry.group[2]} {entry.mixer}: percent found by depth and length"
    return heat(label, values, FIFTHS, [f"{length:,}" for length in lengths], "depth", "tokens")


def _memories(views: Sequence[tuple[str, MemoryView]], number: "count[int]") -> list[Section]:
    sections = []
    for i, (name, view) in enumerate(views):
        whole = "".join(view.tokens)
        parts = [
            f"<p>A prompt of {len(view.tokens)} tokens, read by {escape(name)}:</p>"
            f'<pre tabindex="0">{escape(whole)}</pre>',
            figure(
                "What each token wrote (up) and erased (down, hatched), by block; every block to its own scale",
                scroll("Tokens and blocks", pictures.writes_and_erasures(view)),
            ),
            f"<details><summary>As a table</summary>{table(_tokens(view), number)}</details>",
            figure(
                f"Whose values each token erased, in head {view.head} of block {view.block}, which erased most: the "
                "larger a square, the more of what that earlier token had put there; hollow squares were added to",
                scroll("Tokens and earlier tokens", pictures.takings(view)),
            ),
            figure(
                "How long each channel keeps: half-lives while it read this prompt, a tick for each key channel of a "
                "head, the median as a diamond and in tokens",
                pictures.half_lives(view),
            ),
            grid([figure(head, picture) for head, picture in pictures.gates(view)]),
        ]
        sections.append((f"memory-{i + 1}", f"Memory of {name}", "\n".join(parts)))
    return sections


def _tokens(view: MemoryView) -> Table:
    names = ("written", "erased", "faded")
    sizes = zip(*(pictures.totals(view.blocks, name) for name in names))
    rows = tuple(
        (str(t + 1), pictures.shown(token), *(f"{size:.3f}" for size in changes))
        for t, (token, changes) in enumerate(zip(view.tokens, sizes))
    )
    return Table("Changes of all memories by token (Frobenius norms)", ("no.", "token", *names), rows, 2)


def table(content: Table, number: "count[int]") -> str:
    """A table that scrolls by itself where it is too wide."""
    name = f"table-{next(number)}"
    heads = "".join(f'<th scope="col"{_name(i, content)}>{escape(cell)}</th>' for i, cell in enumerate(content.heads))
    rows = "\n".join(f"<tr>{_cells(row, content)}</tr>" for row in content.rows)
    return (
        f'<div><h3 id="{name}">{escape(content.title)}</h3>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}"><table aria-labelledby="{name}">'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div></div>"
    )


def _cells(row: Sequence[str], content: Table) -> str:
    first, *others = row
    cells = (f"<td{_name(i, content)}>{escape(cell)}</td>" for i, cell in enumerate(others, 1))
    return f'<th scope="row" class="name">{escape(first)}</th>{"".join(cells)}'


def _name(column: int, content: Table) -> str:
    return ' class="name"' if column < content.names else ""


def figure(caption: str, picture: str) -> str:
    """Nothing where there is no picture."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>" if picture else ""


def scroll(name: str, content: str) -> str:
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{content}</div>'


def grid(parts: Sequence[str], small: bool = False) -> str:
    kept = "".join(part for part in parts if part)
    return f'<div class="grid{" small" if small else ""}">{kept}</div>' if kept else ""
