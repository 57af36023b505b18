"""`gdn2 train` in several processes: the same run as in one, resumed with any number of them."""

import json
import shutil
from pathlib import Path

import pytest
import ranks
from safetensors.torch import load_file

from gdn2.config import write_config
from gdn2.training import train

WORKER = Path(__file__).with_name("train_worker.py")
ROUNDING = 1e-4  # of weights near 1 after 20 steps of 1e-2, in float32: what another order of summation makes of them


def save(config, folder):
    folder.mkdir()
    write_config(folder, config)
    return folder / "config.yaml"


def weights(run_dir, step):
    return load_file(run_dir / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def rows(run_dir, kind):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def assert_near(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < ROUNDING, name


def drop(run_dir, step):
    shutil.rmtree(run_dir / "checkpoints" / f"step_{step:08d}")


def test_one_then_two_then_one_process_is_one_run(make_config, tmp_path):
    """Steps 1 to 10 with one process, to 20 with two, to 30 with one; beside it all of them with one."""
    config = make_config(
        "train.batch_tokens=256", "train.tokens=7680", "train.micro_batch=4", "data.packed=true", "train.keep_last=3"
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    shutil.copytree(whole, parts)
    drop(parts, 30)
    drop(parts, 20)
    out = ranks.run(2, WORKER, "--run", parts, "--resume", "train.background_checkpoints=true")
    assert "2 processes: 2 shards" in out
    assert out.count("step 30/30  finished") == 1  # one rank speaks
    folder = parts / "checkpoints" / "step_00000020"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "model.safetensors", "optimizer", "tokenizer.json", "trainer.json"
    }  # fmt: skip
    assert len(list((folder / "optimizer").iterdir())) == 2
    assert_near(weights(whole, 20), weights(parts, 20))
    assert_near(weights(whole, 30), weights(parts, 30))
    drop(parts, 30)
    train(config, parts, resume=True)
    assert_near(weights(whole, 30), weights(parts, 30))
    for kind in ("train", "val"):
        one, many = rows(whole, kind), rows(parts, kind)
        assert [r["step"] for r in one] == [r["step"] for r in many]
        for a, b in zip(one, many):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=1e-5)


def test_other_processes_of_a_run_of_several(make_config, tmp_path):
    """A folder with the checkpoint of two processes is one that every other command and four processes can use."""
