import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gdn2.training.plot import plot_run

ROWS = [
    {"kind": "event", "step": 0, "tokens": 0, "event": "started"},
    *({"kind": "train", "step": i, "tokens": 100 * i, "loss": 5 / i, "grad_norm": 1.0, "tokens_per_second": 9.0}
      for i in range(1, 9)),
    {"kind": "val", "step": 8, "tokens": 800, "loss": 0.7, "bits_per_byte": 1.0},
]  # fmt: skip


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000  # a blank page is smaller


@pytest.mark.parametrize(
    "recall", [None, {"perplexity": {"nats": 1}, "recall": {"percent": 40, "chance_percent": 12.5}}]
)
def test_picture_has_a_panel_for_recall_once_measured(tmp_path: Path, recall: dict[str, Any] | None) -> None:
    write(tmp_path, ROWS)
    if recall:
        (tmp_path / "eval.json").write_text(json.dumps(recall))
    path = plot_run(tmp_path)
    assert path == tmp_path / "plot.png"
    assert is_png(path)
    height = int.from_bytes(path.read_bytes()[20:24], "big")
    assert (height > 1_000) == bool(recall)


def test_names_of_results_as_long_as_two_lines_leave_the_curves_their_room(tmp_path: Path) -> None:
    """Beside the bars they pushed everything off the picture, of which matplotlib warns: an error here."""
    name = f"niah_single_2 at 1,024/2,048; 100 questions, depths {'/'.join(map(str, range(0, 101, 5)))} %, essays.json"
    write(tmp_path, ROWS)
    (tmp_path / "eval.json").write_text(json.dumps({f"{name} {i}": {"percent": 10 * i} for i in range(8)}))
    path = plot_run(tmp_path)
    assert is_png(path)
    assert int.from_bytes(path.read_bytes()[20:24], "big") > 1_700  # a name and its bar each


def test_runs_without_validation_or_with_gaps_are_drawn(tmp_path: Path) -> None:
    rows = [{**r, "loss": None, "grad_norm": None} if r["step"] == 4 else r for r in ROWS]
    assert is_png(plot_run(write(tmp_path, rows[:-1]), tmp_path / "a.png"))
    for change in ({"loss": None}, {"bits_per_byte": None}):
        assert is_png(plot_run(write(tmp_path, [*rows[:-1], ROWS[-1] | change]), tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "holds no results by task"), ('{"a": 1}', "holds no results by task")],
)
def test_results_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(ValueError, match=rf"eval\.json' {message}"):
        plot_run(write(tmp_path, ROWS))


def test_run_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        plot_run(tmp_path)
    with pytest.raises(ValueError, match="has no training rows yet; nothing to plot"):
        plot_run(write(tmp_path, ROWS[:1]))


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="plots need the package matplotlib"):
        plot_run(write(tmp_path, ROWS))
