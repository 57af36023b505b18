"""`gdn2 report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Runs' folders, folders of runs or of experiments' rows, and files of rows (.jsonl)."),
    ],
    out: Annotated[Path, typer.Option(help="The page to write, one file that needs nothing else.")] = Path(
        "report.html"
    ),
    memory: Annotated[
        list[Path] | None,
        typer.Option(help="A run whose memory to look into, several times for several; else the first with one."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What that memory reads; else six lines of keys and values, some written over.")
    ] = None,
) -> None:
    """Compare runs and experiments on one page: tables, curves, needle maps, gates, and what a memory keeps.

    \b
    Examples:
      gdn2 report runs/first runs/second
      gdn2 report runs experiments/results --out all.html
      gdn2 report runs --memory runs/first --prompt "def add(a, b):"
    """
    from gdn2.report.write import PROMPT, write_report

    typer.echo(write_report(paths, out, memory or (), PROMPT if prompt is None else prompt))
