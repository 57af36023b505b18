"""Tables of text: what a report, the terminal and Markdown show alike; means with their spread over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of cells; the first `names` columns hold words, the others numbers."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1

    def markdown(self) -> str:
        lines = [f"| {' | '.join(cells)} |" for cells in (self.heads, ("---",) * len(self.heads), *self.rows)]
        return "\n".join([self.title, "", *lines])


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """The mean, and with two values or more their standard deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"
