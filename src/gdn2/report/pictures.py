"""Pictures of a memory while it reads (see `memory.py`)."""

import math
from collections.abc import Sequence
from statistics import median

from gdn2.report.memory import LONGEST, BlockView, MemoryView
from gdn2.report.svg import LINE, WIDTH, histograms, rect, rule, svg, text

STEP = 18.0  # width of a token's column


def shown(token: str) -> str:
    """A token as it can be read in a picture."""
    names = {" ": "␣", "\n": "⏎", "\t": "⇥", "": "·"}
    return names.get(token, token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥"))[:10]


def writes_and_erasures(view: MemoryView) -> str:
    """A row for each block: bars up for what a token wrote, hatched bars down for what it erased."""
    left, up, down = 64.0, 30.0, 20.0
    row = up + down + 8
    foot = len(view.blocks) * row + 6
    width = left + len(view.tokens) * STEP + 4
    parts = [HATCH]
    for i, block in enumerate(view.blocks):
        base = i * row + up + 4
        most = max(*block.written, *block.erased) or 1
        parts += [text(2, base - 12, f"block {block.block}"), text(2, base + 3, f"most {most:.2g}", css="soft")]
        parts.append(rule(left, base, width - 4, base))
        for t, (written, erased) in enumerate(zip(block.written, block.erased)):
            x = left + t * STEP
            tip = f"{shown(view.tokens[t])} ({t + 1}): written {written:.3g}, erased {erased:.3g}, block {block.block}"
            parts.append(rect(x + 2, base - up * written / most, STEP - 4, up * written / most, "bar", 1, tip))
            tall = down * erased / most
            parts.append(rect(x + 2, base, STEP - 4, tall, "hatched", 1, tip))
    parts += _token_names(view.tokens, left, foot)
    label = f"What each of {len(view.tokens)} tokens wrote and erased, by block; the table below has the numbers"
    return svg(width, foot + _names_height(view.tokens), label, parts, wide=True)


HATCH = (
    '<defs><pattern id="hatch" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line x1="0" y1="0" x2="0" y2="4" class="hatch"/></pattern></defs>'
)


def _names_height(tokens: Sequence[str]) -> float:
    return 14 + 6.8 * max(len(shown(token)) for token in tokens)


def _token_names(tokens: Sequence[str], left: float, top: float) -> list[str]:
    return [
        text(left + (t + 0.5) * STEP + 4, top + 6, shown(token), "end", "token", -90) for t, token in enumerate(tokens)
    ]


def takings(view: MemoryView) -> str:
    """A row for each token, a square for each earlier one whose value it erased, larger for more; hollow where it was
    added to instead."""
    left, top = 92.0, 6.0
    n = len(view.tokens)
    most = max((abs(v) for row in view.taken for v in row), default=0) or 1
    parts = []
    for t, row in enumerate(view.taken):
        y = top + t * STEP
        parts.append(text(left - 6, y + STEP - 4, f"{t + 1} {shown(view.tokens[t])}", "end", "token"))
        parts.append(rule(left, y + STEP, left + t * STEP, y + STEP))
        for s, value in enumerate(row[:t]):
            side = (STEP - 2) * math.sqrt(abs(value) / most)
            if side < 1:
                continue
            x, at = left + (s + 0.5) * STEP - side / 2, y + STEP / 2 - side / 2
            words = "erased" if value > 0 else "added to"
            tip = f"{shown(view.tokens[t])} ({t + 1}) {words} {abs(value):.3g} of {shown(view.tokens[s])} ({s + 1})"
            parts.append(rect(x, at, side, side, "bar" if value > 0 else "hollow", 1, tip))
    foot = top + n * STEP + 4
    parts += _token_names(view.tokens, left, foot)
    label = f"Which earlier tokens' values each token erased in head {view.head} of block {view.block}"
    return svg(left + n * STEP + 6, foot + _names_height(view.tokens), label, parts, wide=True)


def half_lives(view: MemoryView) -> str:
    """A row for each head: a tick for each channel at its half-life, the median marked and named."""
    left, right, top, height = 86.0, WIDTH - 56, 8.0, 22.0

    def at(life: float) -> float:
        share = min(max(math.log2(max(life, 1)), 0), LONGEST) / LONGEST
        return left + share * (right - left)

    rows = [(block.block, head, lives) for block in view.blocks for head, lives in enumerate(block.half_lives)]
    parts = []
    for i, (block, head, lives) in enumerate(rows):
        y = top + i * height
        middle = median(lives)
        parts += [text(left - 8, y + 14, f"block {block}.{head}", "end"), rule(left, y + 9, right, y + 9)]
        parts += [rule(at(life), y + 3, at(life), y + 15, "tick") for life in lives]
        parts.append(
            f'<path d="M0,-5L5,0L0,5L-5,0Z" transform="translate({at(middle):.1f} {y + 9:.1f})" class="middle"/>'
        )
        parts.append(text(right + 8, y + 14, tokens_of(middle)))
    foot = top + len(rows) * height
    for power in range(0, LONGEST + 1, 4):
        x = at(2.0**power)
        parts += [rule(x, foot, x, foot + 4), text(x, foot + LINE, tokens_of(2.0**power), "middle", "soft")]
    parts.append(text(right, foot + 2 * LINE, "half-life, tokens", "end", "soft"))
    return svg(WIDTH, foot + 2 * LINE + 6, "Half-lives of the key channels of every head, in tokens", parts)


def tokens_of(life: float) -> str:
    if life >= 2.0**LONGEST:
        return "for good" if math.isinf(life) else "64k +"
    return f"{life / 1024:.3g}k" if life >= 1024 else f"{life:.3g}"


def gates(view: MemoryView) -> list[tuple[str, str]]:
    """A title and a picture for each gate: erase, write and what is kept, a row for each block."""
    names = [f"block {block.block}" for block in view.blocks]
    found = []
    for title, name, highest in (
        ("Erase gates", "erase", view.largest[0]),
        ("Write gates", "write", view.largest[1]),
        ("Kept of the memory, by token", "keep", 1.0),
    ):
        drawn = [getattr(block, name) for block in view.blocks]
        notes = [f"mean {histogram.mean:.3f}" for histogram in drawn]
        ticks = [f"{highest * share:g}" for share in (0, 0.25, 0.5, 0.75, 1)]
        counts = [histogram.counts for histogram in drawn]
        found.append((title, histograms(f"{title}: values over tokens and channels", counts, names, notes, ticks)))
    return found


def totals(blocks: Sequence[BlockView], name: str) -> list[float]:
    """Root sums of squares over blocks, by token."""
    return [math.sqrt(sum(value * value for value in values)) for values in zip(*(getattr(b, name) for b in blocks))]
