"""Write the tables of docs/results.md anew from the rows in experiments/results.

    python experiments/results.py
    python experiments/results.py --check      # fail where the page does not hold what the rows say

What stands between a pair of marks, `<!-- rows: NAME -->` and `<!-- end -->`, is made from NAME.jsonl; the words around
them are written by hand.
"""

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

import rows

from gdn2.report.experiments import failures, language_entries, language_tables, memory_entries, memory_tables
from gdn2.report.tables import Table

HERE = Path(__file__).parent
MARKS = re.compile(r"(<!-- rows: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables_of(found: list[dict[str, Any]]) -> list[Table]:
    """The tables of one experiment's rows."""
    if found[0]["experiment"] == "memory":
        return memory_tables(memory_entries(found))
    return language_tables(language_entries(found))


def about(found: list[dict[str, Any]]) -> str:
    """How many rows, what they cost, on what, with which code and text."""
    minutes = sum(row["seconds"] / row.get("jobs", 1) for row in found) / 60  # jobs take turns on one device
    lines = [f"{len(found)} rows, {minutes:.1f} minutes of {_counted(row['device'] for row in found)}."]
    lines.append(f"torch {_counted(row['torch'] for row in found)};")
    lines.append(f"sources of gdn2 {_counted(row['code']['source_sha256'][:12] for row in found)}.")
    corpora = {row["corpus"]["train_sha256"]: row["corpus"] for row in found if "corpus" in row}
    lines += [
        f"Text {name[:8]}: {corpus['files']:,} files, {corpus['text_bytes']:,} bytes, list of files "
        f"{corpus['files_sha256'][:12]}."
        for name, corpus in corpora.items()
    ]
    return "\n".join([*lines, *(f"{sentence}." for sentence in failures(found))])


def _counted(values: Any) -> str:
    counts = Counter(values)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{name} ({n} rows)" for name, n in counts.items())


def filled(page: str, folder: Path) -> str:
    """The page with what stands between its marks made anew."""

    def fill(found: re.Match[str]) -> str:
        measured = list(rows.read(folder / f"{found[2]}.jsonl").values())
        if not measured:
            return f"{found[1]}\nNot measured yet.\n\n{found[3]}"
        blocks = [about(measured), *(f"**{table.title}**\n\n{table.grid()}" for table in tables_of(measured))]
        return f"{found[1]}\n" + "\n\n".join(blocks) + f"\n\n{found[3]}"

    return MARKS.sub(fill, page)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "results.md")
    parser.add_argument("--rows", type=Path, default=HERE / "results")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page is not up to date")
    options = parser.parse_args(arguments)
    before = options.page.read_text(encoding="utf-8")
    after = filled(before, options.rows)
    if options.check and after != before:
        parser.error(f"{options.page} does not hold what {options.rows} says; run python experiments/results.py")
    if not options.check:
        options.page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
