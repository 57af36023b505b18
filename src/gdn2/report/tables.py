"""Tables of text: what a report, the terminal and Markdown show alike; means with their spread over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

# Student's t that 2.5 % of the distribution exceed, by degrees of freedom; for more than 10 that of 10, a little wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of cells; the first `names` columns hold words, the others numbers."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1

    def grid(self) -> str:
        """In Markdown, without the title."""
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.heads, ("---",) * len(self.heads), *self.rows))

    def markdown(self) -> str:
        return f"{self.title}\n\n{self.grid()}"


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """The mean, and with two values or more their standard deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def mean_and_interval(values: Sequence[float], digits: int) -> str:
    """The mean with its sign, and with two values or more the half width of its 95 % interval (Student's t)."""
    n = len(values)
    half = "" if n == 1 else f" ± {STUDENT[min(n - 1, len(STUDENT)) - 1] * stdev(values) / sqrt(n):.{digits}f}"
    return f"{fmean(values):+.{digits}f}{half}"
