"""The memory experiment on a CPU: it shows learning, goes on where it stopped, and its summary compares fairly."""

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import memory
import pytest
import rows
from report.conftest import memory_row

from gdn2.config import ConfigError

DOCS = Path(__file__).parents[2] / "docs"
TINY = ["--device", "cpu", "--steps", "25", "--batch", "2"]


def test_gated_deltanet_2_learns_to_overwrite_where_linear_attention_does_not(tmp_path, capsys):
    """Four keys, each written three times: chance is 1 / 32, and 1 / 3 for one of the values that the key had.

    Seeds 0 and 1 gave 99.5 and 98.0 % against 60 and 54 %.
    """
    out = tmp_path / "rows.jsonl"
    memory.main(["--device", "cpu", "--mixers", "gdn2,linear", "--out", str(out)])
    found = {row["mixer"]: {e["load"]: e["accuracy"] for e in row["by_load"]} for row in rows.read(out).values()}
    assert found["gdn2"][4] > 0.95
    assert found["linear"][4] < 0.75
    assert f"| gdn2 | {100 * found['gdn2'][4]:.1f} | 1 | 0.01 of 0.01 |" in capsys.readouterr().out


def test_a_row_holds_all_that_it_depends_on_and_is_measured_once(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    memory.main([*TINY, "--mixers", "gdn2,mamba3", "--out", str(out), "--budget-seconds", "0"])
    assert "2 rows, 2 missing" in capsys.readouterr().out
    assert len(rows.read(out)) == 1  # what is begun within the budget is finished
    before = out.read_text()
    out.write_text(before + '{"key": "half a li')
    memory.main([*TINY, "--mixers", "gdn2,mamba3", "--out", str(out)])
    text = out.read_text()
    assert text.startswith(before)
    assert text.count("\n") == len(text.splitlines()) == 2
    memory.main([*TINY, "--mixers", "gdn2,mamba3", "--out", str(out), "--dry-run"])
    assert "2 rows, 0 missing" in capsys.readouterr().out
    one, two = rows.read(out).values()
    assert one["memory_floats"] == two["memory_floats"] == 32 * 32  # every mixer with the same memory
    assert one["questions_sha256"] == two["questions_sha256"]  # and the same questions
    assert one["code"] == rows.code()
    for name in ("task_settings", "model", "run", "seed", "lr", "seconds", "device", "torch", "loss", "parameters"):
        assert name in one
    assert one["key"] == rows.key_of(next(s for s in memory.grid(size(), ["overwrite"], ["gdn2"])))


def size():
    small = memory.SIZES["small"]
    return replace(small, run=replace(small.run, steps=25, batch=2))


def test_grid_has_every_combination_and_the_mixers_innermost():
    full = memory.SIZES["full"]
    settings = list(memory.grid(full, list(full.tasks), list(memory.MIXERS)))
    assert len(settings) == 3 * 6 * 2 * 2 * len(memory.MIXERS)
    assert [s["mixer"] for s in settings[: len(memory.MIXERS)]] == list(memory.MIXERS)
    assert len({rows.key_of(s) for s in settings}) == len(settings)
    for setting in settings:  # every load can be drawn
        assert json.loads(json.dumps(setting)) is not None
    for task in full.tasks.values():
        task.draw(max(full.run.test_loads), 1, memory.torch.Generator().manual_seed(0))


def test_unknown_names_and_broken_rows_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        memory.main(["--mixers", "gru"])
    assert "'gru'; expected some of gdn2" in capsys.readouterr().err
    for arguments, message in (
        (["--memories", "16"], "--memories has '16'; expected heads x channels"),
        (["--rates", "1e-3,fast"], "--rates has 'fast'; expected numbers above 0"),
    ):
        with pytest.raises(SystemExit):
            memory.main(arguments)
        assert message in capsys.readouterr().err
    memory.main(["--memories", "1x8,2x16", "--rates", "1e-3", "--dry-run", "--out", str(tmp_path / "none.jsonl")])
    assert "14 rows, 14 missing" in capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: no row of an experiment"):
        rows.read(tmp_path / "rows.jsonl")


def test_the_documented_command_makes_the_rows_of_2000_steps(capsys):
    """Their warm-up is not the size's; a row is found by all its settings."""
    (command,) = [line for line in (DOCS / "experiments.md").read_text().splitlines() if "--steps 2000" in line]
    words = command.partition("#")[0].split()
    assert words[:2] == ["python", "experiments/memory.py"]
    memory.main([*words[2:], "--dry-run"])
    assert "112 rows, 0 missing" in capsys.readouterr().out
    warm_up = words.index("--warm-up")
    memory.main([*words[2:warm_up], *words[warm_up + 2 :], "--dry-run"])
    assert "112 rows, 112 missing" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="warmup_tokens is 25; expected fewer than the 25 steps"):
        memory.main([*TINY, "--warm-up", "25", "--dry-run"])


def test_rows_side_by_side_are_those_in_turn(tmp_path, capsys):
    in_turn, beside = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    arguments = [*TINY, "--mixers", "gdn2,linear,deltanet"]
    memory.main([*arguments, "--out", str(in_turn)])
    memory.main([*arguments, "--out", str(beside), "--jobs", "2", "--budget-seconds", "0"])
    assert "nearly spent; the same command goes on with 1 rows" in capsys.readouterr().out
    assert len(rows.read(beside)) == 2  # what is begun within the budget is finished
    memory.main([*arguments, "--out", str(beside), "--jobs", "2"])
    expected, found = rows.read(in_turn), rows.read(beside)
    assert set(found) == set(expected)
    for key, row in found.items():
        assert row["jobs"] == 2
        assert row["loss"] == pytest.approx(expected[key]["loss"], rel=1e-4)  # of another number of threads


def test_a_training_that_diverges_is_a_row_that_says_so_and_the_grid_goes_on(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    memory.main([*TINY, "--mixers", "gdn2", "--rates", "1e30,1e-2", "--out", str(out)])
    broken, good = rows.read(out).values()
    assert broken["failed"].startswith("the loss of step ")
    assert "by_load" not in broken
    assert "by_load" in good
    shown = capsys.readouterr().out
    assert "overwrite gdn2 [1, 32, 32] lr 1e+30 seed 0: the loss of step" in shown
    name = "overwrite, memory 1 x 32 x 32 a layer, 25 steps of 2, warm-up of 20: gdn2"
    assert f"{name} at learning rate 1e+30, seed 0, failed: {broken['failed']}." in shown
    memory.main([*TINY, "--mixers", "gdn2", "--rates", "1e30,1e-2", "--out", str(out), "--summary"])
    assert "2 rows, 0 missing" in capsys.readouterr().out


def test_a_row_says_whether_its_code_is_that_of_its_commit(tmp_path, monkeypatch):
    package = tmp_path / "gdn2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(rows.gdn2, "__file__", str(package / "__init__.py"))
    alone = rows.code()
    assert (alone["commit"], alone["changed"]) == (None, None)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    kept = rows.code()
    assert (len(kept["commit"]), kept["changed"], kept["source_sha256"]) == (40, False, alone["source_sha256"])
    (package / "new.py").write_text("x = 1\n")
    other = rows.code()
    assert (other["commit"], other["changed"]) == (kept["commit"], True)
    assert other["source_sha256"] != kept["source_sha256"]
    monkeypatch.setenv("PATH", "")
    assert rows.code()["commit"] is None


def slow_or_broken(setting):
    """At the top of the file, for another process to find."""
    if setting["name"] == "broken":
        raise RuntimeError("out of memory")
    time.sleep(setting["seconds"])
    return memory_row(rows.key_of(setting), "gdn2", 1e-3, 0) | setting


def test_a_row_that_raises_costs_none_that_is_measured_beside_it(tmp_path):
    settings = [{"name": "slow", "seconds": 1.0}, {"name": "broken"}, {"name": "never begun", "seconds": 0.0}]
    options = SimpleNamespace(device="cpu", jobs=2, budget_seconds=float("inf"), dry_run=False, summary=False)
    with pytest.raises(RuntimeError, match="out of memory"):
        rows.work(settings, tmp_path / "rows.jsonl", options, slow_or_broken, lambda row: row["name"])
    assert [row["name"] for row in rows.read(tmp_path / "rows.jsonl").values()] == ["slow"]
