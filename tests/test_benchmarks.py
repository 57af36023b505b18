"""Benchmark scripts run, on small models here; what they say of sizes is right."""

import importlib.util
import json
from pathlib import Path

import pytest

from gdn2 import LanguageModel, preset

FOLDER = Path(__file__).parent.parent / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = ["--device", "cpu", "--batches", "1", "3", "--context", "100", "--tokens", "4", "--lengths", "64", "200"]
SMALL += ["--contexts", "64", "300", "--read", "300", "--attention-read", "64", "--chunk", "100", "--copy", "100000"]


def test_generation_is_measured_and_its_sizes_are_right(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"row": "before"}\n')
    models = ["gdn2-tiny", "transformer-full-tiny", "gdn2-tiny+int8"]
    script("gpu_generate").main([*SMALL, "--models", *models, "--json", str(file)])
    rows = {row["row"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert capsys.readouterr().out.splitlines() == file.read_text().splitlines()[1:]
    names = ["before", "copy"]
    for model in models[:2]:
        kinds = ("step", "narrow") if model == "gdn2-tiny" else ("step",)
        names += [f"{kind}:{model}:{n}" for n in (1, 3) for kind in kinds] + [f"context:{model}:{n}" for n in (64, 300)]
        names += [f"text:{model}", f"first:{model}:64"] + ([f"first:{model}:200"] if model == "gdn2-tiny" else [])
        names += [f"memory:{model}:{n}" for n in (64, 300)]
    assert list(rows) == [*names, "step:gdn2-tiny+int8:1", "step:gdn2-tiny+int8:3"]

    config = preset("gdn2-tiny")
    memory = 4 * config.num_layers * config.num_heads * config.key_dim * config.value_dim
    tails = 4 * config.num_layers * 3 * 3 * config.num_heads * config.key_dim
    for context in (64, 300):  # of one size whatever was read
        row = rows[f"memory:gdn2-tiny:{context}"]
        assert row["state_bytes"] == row["measured_state_bytes"] == memory + tails
    keys = 2 * 4 * config.d_model * config.num_layers
    full = {n: rows[f"memory:transformer-full-tiny:{n}"] for n in (64, 300)}
    assert full[64]["measured_state_bytes"] == full[64]["state_bytes"] == 64 * keys + 8 * config.num_layers
    assert (full[300]["state_bytes"], "measured_state_bytes" in full[300]) == (
        300 * keys + 8 * config.num_layers,
        False,
    )

    step = rows["step:gdn2-tiny:3"]
    weights = 4 * (LanguageModel(config).num_parameters() - config.vocab_size * config.d_model)
    assert step["weight_GB"] == pytest.approx(weights / 1e9, rel=1e-3)
    assert step["state_GB"] == pytest.approx(2 * 3 * (memory + tails) / 1e9, rel=1e-3)
    assert rows["narrow:gdn2-tiny:3"]["state_GB"] == pytest.approx(2 * 3 * (memory / 2 + tails) / 1e9, rel=1e-3)
    narrow = LanguageModel(config).quantize("int8")
    weights = sum(t.nbytes for t in (*narrow.parameters(), *narrow.buffers())) - 4 * config.vocab_size * config.d_model
    assert rows["step:gdn2-tiny+int8:1"]["weight_GB"] == pytest.approx(weights / 1e9, rel=1e-3)
    assert rows["context:transformer-full-tiny:300"]["state_GB"] == pytest.approx(300 * keys / 1e9, rel=1e-3)
    assert step["tokens_per_s"] == pytest.approx(3e3 / step["ms"], rel=1e-3)
    assert step["of_floor"] == pytest.approx(step["floor_ms"] / step["ms"], rel=1e-3)


def test_rows_are_chosen_by_name(capsys):
    script("gpu_generate").main(["--rows", "step:gdn2-1.3b:*", "first:*hybrid*:4096", "--list"])
    assert capsys.readouterr().out.split() == [
        "step:gdn2-1.3b:1", "step:gdn2-1.3b:64", "step:gdn2-1.3b:256", "first:gdn2-hybrid-1.3b:4096",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="no row is called steps"):
        script("gpu_generate").main(["--rows", "steps"])


@pytest.mark.parametrize("wanted", ["project.MOST_ROWS", "project.NONE=1", "none.MOST_ROWS=1", "project.MOST_ROWS=x"])
def test_constants_that_are_not_there_are_refused(wanted):
    with pytest.raises(SystemExit, match=f"--set {wanted}: .*; expected MODULE.NAME=INTEGER"):
        script("gpu_generate").main(["--device", "cpu", "--rows", "step:*", "--set", wanted])


def test_constants_of_kernels_are_set(monkeypatch):
    from gdn2.ops.kernels import early, project

    monkeypatch.setattr(project, "MOST_ROWS", project.MOST_ROWS)
    monkeypatch.setattr(early, "NEXT", early.NEXT)
    change = script("gpu_generate").set_constant
    change("project.MOST_ROWS=0")
    change("early.NEXT=0")
    assert (project.MOST_ROWS, early.NEXT) == (0, 0)
