"""From rows to a table: the best learning rate of each, mean and standard deviation over seeds."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One entry for each task, memory and mixer: the learning rate whose mean accuracy on validation questions, over
    its seeds and loads, is highest, and with it for every test load the accuracies of all seeds, their mean and their
    standard deviation (None of one seed). Only rates that all seeds of the group have are compared.
    """
    groups: dict[tuple, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["task"], tuple(row["memory"]), row["mixer"]][row["lr"]].append(row)
    return [_entry(*name, rates) for name, rates in groups.items()]


def _entry(task: str, memory: tuple[int, ...], mixer: str, rates: dict[float, list[Row]]) -> Row:
    most = max(map(len, rates.values()))
    whole = {rate: found for rate, found in rates.items() if len(found) == most}
    best = max(whole, key=lambda rate: fmean(fmean(e["accuracy"] for e in row["validation"]) for row in whole[rate]))
    chosen = whole[best]
    by_load = []
    for entries in zip(*(row["by_load"] for row in chosen)):
        found = [entry["accuracy"] for entry in entries]
        spread = stdev(found) if len(found) > 1 else None
        by_load.append({"load": entries[0]["load"], "seeds": found, "mean": fmean(found), "deviation": spread})
    about = {"task": task, "memory": list(memory), "mixer": mixer, "lr": best, "rates": sorted(rates)}
    return about | {"seeds": most, "parameters": chosen[0]["parameters"], "by_load": by_load}


def table(entries: Sequence[Row]) -> str:
    """Markdown: a row for each mixer, a column for each load, percent right and its deviation over seeds."""
    blocks = []
    for task, memory in dict.fromkeys((e["task"], tuple(e["memory"])) for e in entries):
        mine = [e for e in entries if (e["task"], tuple(e["memory"])) == (task, memory)]
        loads = [cell["load"] for cell in mine[0]["by_load"]]
        lines = [
            f"{task}, memory {' x '.join(map(str, memory))} a layer, accuracy in percent by load",
            "",
            "| mixer | seeds | lr | " + " | ".join(map(str, loads)) + " |",
            "|---|---|---|" + "---|" * len(loads),
        ]
        for entry in sorted(mine, key=lambda e: -fmean(cell["mean"] for cell in e["by_load"])):
            cells = " | ".join(_cell(cell) for cell in entry["by_load"])
            lines.append(f"| {entry['mixer']} | {entry['seeds']} | {entry['lr']:g} | {cells} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cell(cell: Row) -> str:
    spread = "" if cell["deviation"] is None else f" ± {100 * cell['deviation']:.1f}"
    return f"{100 * cell['mean']:.1f}{spread}"
