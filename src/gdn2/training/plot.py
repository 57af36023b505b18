"""A picture of a run: loss, throughput and gradient norm over tokens, and needle recall once it was measured."""

import json
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from gdn2.training.metrics import Row, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME_WIDTH = 110  # letters of a result's name in a line
NAME_LINE = 0.6  # the height of such a line, a bar having 0.5
BLUE, ORANGE = "#1f4e9c", "#d9731a"  # apart in lightness too; shapes and labels carry the meaning


def plot_run(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Draw RUN/metrics.jsonl (and the recall in RUN/eval.json, when it is there) into a PNG; RUN/plot.png by default.

    ValueError when the run has no training rows yet, a file is not what it should be, or matplotlib is missing.
    """
    run_dir = Path(run_dir)
    out = run_dir / "plot.png" if out is None else Path(out)
    rows = read_metrics(run_dir)
    train = [row for row in rows if row["kind"] == "train"]
    if not train:
        raise ValueError(f"{str(run_dir)!r} has no training rows yet; nothing to plot")
    recall = _recall(run_dir / "eval.json")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need the package matplotlib: pip install 'gdn2[plot]'") from error
    bars = 0.3 * _height(recall)  # inches
    figure = Figure(figsize=(9, 6.9 + bars if recall else 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [1.9, 1, 0.28 + bars / 1.9] if recall else [1.9, 1]
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    _loss(figure.add_subplot(grid[0, :]), train, [row for row in rows if row["kind"] == "val"])
    _curve(figure.add_subplot(grid[1, 0]), train, "tokens_per_second", "throughput", "tokens / s", log=False)
    _curve(figure.add_subplot(grid[1, 1]), train, "grad_norm", "gradient norm, before clipping", "", log=True)
    if recall:
        _bars(figure.add_subplot(grid[2, :]), recall)
    figure.suptitle(f"run {run_dir.resolve().name}")
    figure.savefig(out)
    return out


def _loss(axes: "Axes", train: list[Row], val: list[Row]) -> None:
    axes.plot(_tokens(train), _values(train, "loss"), color=BLUE, linewidth=1.2, label="training")
    if val:
        style: dict[str, Any] = {"color": ORANGE, "linewidth": 1.8, "linestyle": "--", "marker": "o"}
        axes.plot(_tokens(val), _values(val, "loss"), label="validation", **style)
    if val and val[-1]["loss"] is not None:
        last = val[-1]
        bits = "" if last["bits_per_byte"] is None else f"\n{last['bits_per_byte']:.3f} bits per byte"
        text = f"validation {last['loss']:.3f} nats{bits}"
        axes.annotate(text, (last["tokens"], last["loss"]), (-6, 16), textcoords="offset points", ha="right")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    _dress(axes, "loss")


def _curve(axes: "Axes", rows: list[Row], key: str, title: str, label: str, log: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.plot(_tokens(rows), _values(rows, key), color=BLUE, linewidth=1.0)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set_ylabel(label)
    _dress(axes, title)


def _bars(axes: "Axes", recall: dict[str, Row]) -> None:
    """A bar for each result with its name above, which may be as long as the picture is wide, and longer."""
    y = 0.0
    for name, result in recall.items():
        lines = wrap(name, NAME_WIDTH)
        axes.text(0.3, y, "\n".join(lines), va="top", fontsize=8)
        y += NAME_LINE * len(lines) + 0.3
        bar = axes.barh(y, result["percent"], color=BLUE, height=0.5)
        chance = f" (chance {result['chance_percent']:.1f} %)" if "chance_percent" in result else ""
        axes.bar_label(bar, [f"{result['percent']:.1f} %{chance}"], padding=4)
        y += 0.5
    axes.set_xlim(0, 125)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(y, -0.1)
    axes.set_yticks([])
    axes.set_xlabel("right answers, %")
    axes.set_title("recall", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _height(recall: dict[str, Row]) -> float:
    """Of the bars, in their own units."""
    return sum(NAME_LINE * len(wrap(name, NAME_WIDTH)) + 0.8 for name in recall)


def _dress(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("training tokens")
    axes.set_xlim(left=0)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _tokens(rows: list[Row]) -> list[int]:
    return [row["tokens"] for row in rows]


def _values(rows: list[Row], key: str) -> list[float]:
    return [float("nan") if row[key] is None else row[key] for row in rows]  # null was not finite: a gap


def _recall(path: Path) -> dict[str, Any]:
    """The tasks of eval.json that have a percentage of right answers."""
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); move it away or evaluate anew") from error
    if not isinstance(results, dict) or not all(isinstance(result, dict) for result in results.values()):
        raise ValueError(f"{str(path)!r} holds no results by task; move it away or evaluate anew")
    return {task: result for task, result in results.items() if "percent" in result}
