"""Pictures as SVG text: lines, bars, heat maps, histograms. Each carries numbers or patterns beside its colours.

All are drawn for a width of 360 units, a phone's, with text of 11; a page may scale them up. Colours are the page's CSS
variables, so that they follow light and dark.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360.0
LINE = 16.0  # height of a line of text
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")
SHADE = 0.7  # of the darkest cell: numbers on it keep a contrast of 4.5
MARKS = ("circle", "square", "triangle", "diamond", "cross")


def svg(width: float, height: float, label: str, parts: Sequence[str], wide: bool = False) -> str:
    """A picture with a name for those who cannot see it; `wide` ones keep their size and are scrolled."""
    size = f' width="{width:g}" height="{height:g}" class="wide"' if wide else ""
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}"{size} role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">\n<title>{escape(label)}</title>\n{body}\n</svg>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", css: str = "", turn: float = 0) -> str:
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    named = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}{turned}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, css: str, opacity: float = 1, tip: str = "") -> str:
    shade = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
    start = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{css}"{shade}'
    return f"{start}><title>{escape(tip)}</title></rect>" if tip else f"{start}/>"


def rule(x1: float, y1: float, x2: float, y2: float, css: str = "grid") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


@dataclass(frozen=True)
class Series:
    """A named line through points, left to right; a gap where y is None. `style` numbers its colour, dashes and mark,
    for a name that is drawn in several pictures; without it that is its place among the lines."""

    name: str
    points: Sequence[tuple[float, float | None]]
    style: int | None = None


def lines(
    label: str, series: Sequence[Series], x_name: str, y_name: str, log_x: bool = False, high_first: bool = False
) -> str:
    """Lines over a common plane, with their names and last values in a list below, lowest first or highest first."""
    drawn = [s for s in series if any(y is not None for _, y in s.points)]
    xs = [x for s in drawn for x, y in s.points if y is not None]
    ys = [y for s in drawn for _, y in s.points if y is not None]
    if not xs:
        return ""
    x_ticks = _log_ticks(min(xs), max(xs)) if log_x else nice_ticks(min(xs), max(xs), 4)
    y_ticks = nice_ticks(min(ys), max(ys), 5)
    left, right, top, bottom = 44.0, WIDTH - 10, 22.0, 210.0
    low_y, high_y = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    scale = math.log2 if log_x else float
    low_x, high_x = scale(min(xs)), scale(max(xs))

    def at(x: float, y: float) -> tuple[float, float]:
        share = (scale(x) - low_x) / ((high_x - low_x) or 1)
        return left + share * (right - left), bottom - (y - low_y) / ((high_y - low_y) or 1) * (bottom - top)

    parts = [text(2, 12, y_name, css="soft")]
    for tick in y_ticks:
        _, y = at(min(xs), tick)
        parts += [rule(left, y, right, y), text(left - 5, y + 4, short(tick), "end", "soft")]
    for tick in x_ticks:
        if min(xs) <= tick <= max(xs):
            x, _ = at(tick, low_y)
            anchor = "end" if x > right - 14 else "middle"
            parts += [rule(x, bottom, x, bottom + 4), text(x, bottom + LINE, short(tick), anchor, "soft")]
    parts.append(text(right, bottom + 2 * LINE, x_name, "end", "soft"))
    y = bottom + 3.4 * LINE
    ordered = sorted(range(len(drawn)), key=lambda i: _last(drawn[i]), reverse=high_first)
    for i in ordered:
        n = i if (style := drawn[i].style) is None else style
        dash, mark, colour = DASHES[n % len(DASHES)], MARKS[n % len(MARKS)], f"c{n % 6}"
        css = f"line {colour}"
        for piece in _pieces(drawn[i].points):
            spots = [at(x, value) for x, value in piece]
            path = " ".join(f"{x:.1f},{value:.1f}" for x, value in spots)
            parts.append(f'<polyline points="{path}" class="{css}" stroke-dasharray="{dash}"/>')
            every = max(1, len(spots) // 6)
            parts += [_mark(x, value, mark, colour) for x, value in spots[every // 2 :: every]]
        parts.append(f'<polyline points="6,{y - 4:.1f} 36,{y - 4:.1f}" class="{css}" stroke-dasharray="{dash}"/>')
        parts += [_mark(21, y - 4, mark, colour), text(44, y, drawn[i].name[:44])]
        parts.append(text(right, y, f"{_last(drawn[i]):.4g}", "end"))
        y += LINE
    return svg(WIDTH, y - LINE + 8, label, parts)


def _last(series: Series) -> float:
    return next(y for _, y in reversed(series.points) if y is not None)


def _pieces(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _mark(x: float, y: float, kind: str, css: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="mark {css}"/>'
    shapes = {
        "square": "M-3,-3H3V3H-3Z",
        "triangle": "M0,-4L4,3H-4Z",
        "diamond": "M0,-4L4,0L0,4L-4,0Z",
        "cross": "M-3,-3L3,3M3,-3L-3,3",
    }
    return f'<path d="{shapes[kind]}" transform="translate({x:.1f} {y:.1f})" class="mark {css}"/>'


def heat(
    label: str,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    row_name: str,
    column_name: str,
    highest: float = 100.0,
    shown: Callable[[float], str] = lambda value: f"{value:.0f}",
) -> str:
    """A grid of numbers from 0 to `highest`, the larger the darker; a cell without a value is empty and crossed."""
    left, top, height = 60.0, 2.2 * LINE, 24.0
    width = (WIDTH - left - 2) / len(columns)
    parts = [text(2, top - 6, row_name, css="soft"), text(WIDTH - 2, LINE - 4, column_name, "end", "soft")]
    for j, name in enumerate(columns):
        parts.append(text(left + (j + 0.5) * width, top - 6, name, "middle"))
    for i, row in enumerate(values):
        y = top + i * height
        parts.append(text(left - 6, y + height / 2 + 4, rows[i], "end"))
        for j, value in enumerate(row):
            x = left + j * width
            parts.append(rect(x + 1, y + 1, width - 2, height - 2, "cell"))
            if value is None:
                parts.append(rule(x + 4, y + height - 4, x + width - 4, y + 4))
                continue
            share = min(max(value / highest, 0), 1)
            parts.append(rect(x + 1, y + 1, width - 2, height - 2, "heat", SHADE * share))
            parts.append(text(x + width / 2, y + height / 2 + 4, shown(value), "middle"))
    return svg(WIDTH, top + len(values) * height + 2, label, parts)


def histograms(
    label: str, counts: Sequence[Sequence[float]], rows: Sequence[str], notes: Sequence[str], ticks: Sequence[str]
) -> str:
    """A row of bars for each of `counts`, all bins of a row as shares of its fullest; `ticks` lie along the foot."""
    left, right, height = 62.0, WIDTH - 74, 26.0
    parts = []
    for i, row in enumerate(counts):
        foot = (i + 1) * height
        parts += [text(left - 6, foot - 4, rows[i], "end"), text(right + 6, foot - 4, notes[i])]
        width, most = (right - left) / len(row), max(row) or 1
        for j, count in enumerate(row):
            tall = (height - 5) * count / most
            if tall > 0:
                parts.append(rect(left + j * width + 0.5, foot - tall, width - 1, tall, "bar"))
        parts.append(rule(left, foot, right, foot))
    foot = len(counts) * height
    for j, tick in enumerate(ticks):
        x = left + j * (right - left) / max(len(ticks) - 1, 1)
        parts += [rule(x, foot, x, foot + 4), text(x, foot + LINE, tick, "middle", "soft")]
    return svg(WIDTH, foot + LINE + 6, label, parts)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of two within the range, every one or few."""
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    return [2.0**p for p in powers[:: max(1, len(powers) // 6)]]


def short(value: float) -> str:
    """A number for an axis: 1.5M, 20k, 0.25."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.6g}"
