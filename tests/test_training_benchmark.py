"""benchmarks/training.py runs, alone and as two ranks, and counts tokens by ranks that read data."""

import importlib.util
import json
from pathlib import Path

import ranks

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "training.py"
OPTIONS = ["--preset", "gdn2-hybrid-tiny", "--seq-len", "64", "--batch", "2", "--steps", "2", "--warm-up", "1"]
SMALLER = ["model.num_layers=2", "train.device=cpu"]


def test_one_process_and_two(tmp_path):
    spec = importlib.util.spec_from_file_location("training_benchmark", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    one = script.main([*OPTIONS, "--json", str(tmp_path / "rows"), "--profile", str(tmp_path / "profile"), *SMALLER])
    assert json.loads((tmp_path / "rows").read_text()) == one
    assert "gdn2::chunk" in (tmp_path / "profile").read_text()
    assert one["tokens_per_second"] == one["tokens_per_second_per_process"] > 0
    two = json.loads(ranks.run_well(2, SCRIPT, *OPTIONS, *SMALLER, "train.recompute=full"))
    assert two["processes"] == 2
    for row, tokens in ((one, 128), (two, 256)):
        assert abs(row["tokens_per_second"] * row["step_ms"] / 1e3 - tokens) < 1
    assert two["parameters"] == one["parameters"]
