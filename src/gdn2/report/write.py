"""From paths to a file: read what is there, look into a model's memory, write the page."""

import os
from collections.abc import Sequence
from pathlib import Path

from gdn2.config import DELTA_RULES
from gdn2.report.memory import view_memory
from gdn2.report.page import page
from gdn2.report.sources import Run, read_sources

PROMPT = "a=1\nb=2\na=3\nb=4\n\na="  # both values are written over


def write_report(paths: Sequence[Path], out: Path, memory: Sequence[Path] = (), prompt: str = PROMPT) -> Path:
    """Write the page about everything under `paths` (see `read_sources`) to `out`, an .html file.

    The memory of each run in `memory` is shown while it reads the prompt; without any, that of the first run under the
    paths which has a checkpoint of a delta rule, Gated DeltaNet-2 before others. ValueError for what cannot be read,
    before anything is written.
    """
    if out.suffix != ".html":
        raise ValueError(f"out is {str(out)!r}; expected a name that ends in .html")
    sources = read_sources(paths)
    views = [(path.resolve().name, view_memory(path, prompt)) for path in memory or _first(sources.runs)]
    html = page(sources, views)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, out)
    return out


def _first(runs: Sequence[Run]) -> list[Path]:
    """The first run with a checkpoint and a memory that erases, of Gated DeltaNet-2 where there is one."""
    erasing = [run for run in runs if run.config.model.mixer in DELTA_RULES and "mixer" in run.config.model.cell]
    saved = [run for run in erasing if any((run.path / "checkpoints").glob("step_*"))]
    return [run.path for run in sorted(saved, key=lambda run: DELTA_RULES.index(run.config.model.mixer))[:1]]
