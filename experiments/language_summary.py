"""From rows of the language experiment to tables: the best learning rate of each, mean and deviation over seeds."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One entry for each corpus, length of training, kind and mixer: `rows` of all its seeds at the learning rate whose
    mean bits per byte over them are lowest. Only rates that all seeds of the group have are compared."""
    groups: dict[tuple, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        text, tokens = row["corpus"]["train_sha256"], row["config"]["train"]["tokens"]
        groups[text, tokens, row["kind"], row["mixer"]][row["lr"]].append(row)
    entries = []
    for (text, tokens, kind, mixer), rates in groups.items():
        most = max(map(len, rates.values()))
        whole = {rate: found for rate, found in rates.items() if len(found) == most}
        best = min(whole, key=lambda rate: fmean(_bits(row)[0] for row in whole[rate]))
        about = {"text": text, "tokens": tokens, "kind": kind, "mixer": mixer, "lr": best, "rates": sorted(rates)}
        entries.append(about | {"seeds": most, "rows": whole[best]})
    return entries


def _bits(row: Row) -> list[float]:
    return [score["bits_per_byte"] for score in row["language"].values()]


def table(entries: Sequence[Row]) -> str:
    """Markdown: for each text and length of training a table of bits per byte, and one of needles for each task."""
    blocks = []
    for text, tokens in dict.fromkeys((e["text"], e["tokens"]) for e in entries):
        mine = sorted(
            (e for e in entries if (e["text"], e["tokens"]) == (text, tokens)),
            key=lambda e: (e["kind"] != "recurrent", e["kind"], fmean(_bits(row)[0] for row in e["rows"])),
        )
        first = mine[0]["rows"][0]
        title = f"text {text[:8]}, {tokens:,} tokens each"
        heads = [f"windows of {length}" for length in first["language"]]
        columns: list[Callable[[Row], float]] = [lambda row, i=i: _bits(row)[i] for i in range(len(heads))]
        blocks.append(_table(f"Bits per byte of held-out files; {title}", mine, heads, columns, 4))
        for task in dict.fromkeys(cell["task"] for cell in first["needles"]):
            lengths = [cell["length"] for cell in first["needles"] if cell["task"] == task]
            columns = [lambda row, t=task, n=length: _found(row, t, n) for length in lengths]
            samples = first["needles"][0]["samples"]
            name = f"{task}, percent of {samples} found, by tokens of the prompt; {title}"
            blocks.append(_table(name, mine, list(map(str, lengths)), columns, 1))
    return "\n\n".join(blocks)


def _found(row: Row, task: str, length: int) -> float:
    return next(cell["found"] for cell in row["needles"] if (cell["task"], cell["length"]) == (task, length))


def _table(
    title: str, entries: Sequence[Row], heads: list[str], columns: list[Callable[[Row], float]], digits: int
) -> str:
    lines = [
        title,
        "",
        "| kind | mixer | parameters | seeds | lr | " + " | ".join(heads) + " |",
        "|---|---|---|---|---|" + "---|" * len(heads),
    ]
    for entry in entries:
        cells = " | ".join(mean_and_deviation([value(row) for row in entry["rows"]], digits) for value in columns)
        size = f"{entry['rows'][0]['parameters'] / 1e6:.2f}M"
        lines.append(f"| {entry['kind']} | {entry['mixer']} | {size} | {entry['seeds']} | {entry['lr']:g} | {cells} |")
    return "\n".join(lines)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"
