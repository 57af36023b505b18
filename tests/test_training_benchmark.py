"""benchmarks/training.py runs, alone and as two ranks, and counts tokens by ranks that read data."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import ranks

from gdn2.layers import GatedDeltaNet2
from gdn2.ops import gated_delta_rule_2

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "training.py"
OPTIONS = ["--preset", "gdn2-hybrid-tiny", "--seq-len", "64", "--batch", "2", "--steps", "2", "--warm-up", "1"]
SMALLER = ["model.num_layers=2", "train.device=cpu"]


def load():
    spec = importlib.util.spec_from_file_location("training_benchmark", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_sizes_one_after_the_other_and_an_operator_in_the_place_of_ours(monkeypatch):
    """With a stand-in for flash-linear-attention that is our own operator losses are the same."""
    calls = []

    def chunk_gdn2(*operands, cu_seqlens):
        calls.append([list(x.shape) for x in operands])
        return gated_delta_rule_2(*operands, cu_seqlens=cu_seqlens)

    stand_in = types.ModuleType("fla.ops.gdn2")
    stand_in.chunk_gdn2 = chunk_gdn2
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gdn2", stand_in)
    monkeypatch.setattr(GatedDeltaNet2, "rule", GatedDeltaNet2.rule)
    script, options = load(), [*OPTIONS, "--sizes", "32x2,64x1", *SMALLER]
    ours = script.main(options)
    assert not calls
    theirs = script.main([*options, "--operator", "fla"])
    assert len(calls) == 2 * 3  # sizes, steps of one Gated DeltaNet-2 layer
    assert calls[0] == [[2, 32, 2, 64]] * 6
    assert [(row["seq_len"], row["batch"]) for row in theirs] == [(32, 2), (64, 1)]
    for a, b in zip(ours, theirs):
        assert (a["operator"], b["operator"]) == ("ours", "fla")
        assert b["last_loss"] == pytest.approx(a["last_loss"], rel=1e-5)


@pytest.mark.parametrize("text", ["4096", "4096x", "0x4", "4096x4x2", "4096x4,"])
def test_sizes_that_are_none_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        load().main(["--sizes", text])
    assert f"{text!r}; expected LENGTHxBATCH" in capsys.readouterr().err


def test_one_process_and_two(tmp_path):
    script = load()
    (one,) = script.main([*OPTIONS, "--json", str(tmp_path / "rows"), "--profile", str(tmp_path / "profile"), *SMALLER])
    assert json.loads((tmp_path / "rows").read_text()) == one
    assert "gdn2::chunk" in (tmp_path / "profile").read_text()
    assert one["tokens_per_second"] == one["tokens_per_second_per_process"] > 0
    two = json.loads(ranks.run_well(2, SCRIPT, *OPTIONS, *SMALLER, "train.recompute=full"))
    assert two["processes"] == 2
    for row, tokens in ((one, 128), (two, 256)):
        assert abs(row["tokens_per_second"] * row["step_ms"] / 1e3 - tokens) < 1
    assert two["parameters"] == one["parameters"]
