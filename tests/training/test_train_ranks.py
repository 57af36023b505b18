"""`gdn2 train` in several processes: the same run as in one, resumed with any number of them, whatever happens."""

import json
import shutil
import time
from pathlib import Path

import pytest
import ranks
from safetensors.torch import load_file

from gdn2.cli.common import load
from gdn2.config import write_config
from gdn2.training import CheckpointError, checkpoint, train

WORKER = Path(__file__).with_name("train_worker.py")
ROUNDING = (
    1e-4  # of weights near 1 after a few steps of 1e-2, in float32: what another order of summation makes of them
)


def new_run(size, event, config, run_dir):
    path = run_dir.with_suffix(".config")
    path.mkdir()
    write_config(path, config)
    return ranks.run(size, WORKER, event, path / "config.yaml", "--run", run_dir)


def weights(run_dir, step):
    return load_file(run_dir / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def rows(run_dir, kind):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def assert_near(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < ROUNDING, name


def assert_same_rows(one, many):
    for kind in ("train", "val"):
        pairs = list(zip(rows(one, kind), rows(many, kind), strict=True))
        for a, b in pairs:
            assert (a["step"], a["tokens"], a["lr"] if kind == "train" else 0) == (
                b["step"], b["tokens"], b["lr"] if kind == "train" else 0
            )  # fmt: skip
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=1e-5)
    for a, b in zip(rows(one, "layers"), rows(many, "layers"), strict=True):
        for one_layer, same in zip(a["layers"], b["layers"], strict=True):
            assert one_layer == pytest.approx(same, rel=1e-3)


def drop(run_dir, step):
    shutil.rmtree(run_dir / "checkpoints" / f"step_{step:08d}")


def test_one_then_two_then_one_process_is_one_run(make_config, tmp_path):
    """Steps 1 to 4 with one process, to 8 with two, to 12 with one; beside it all of them with one."""
    config = make_config(
        "train.batch_tokens=256", "train.tokens=3072", "train.micro_batch=4", "data.packed=true", "train.keep_last=3",
        "train.checkpoint_every=4", "train.eval_every=4", "train.log_every=1",
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    shutil.copytree(whole, parts)
    drop(parts, 12)
    drop(parts, 8)
    codes, out = ranks.run(2, WORKER, "", "--run", parts, "--resume", "train.background_checkpoints=true")
    assert codes == [0, 0], out
    assert "2 processes: 2 shards" in out
    assert out.count("step 12/12  finished") == 1  # one rank speaks
    folder = parts / "checkpoints" / "step_00000008"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "model.safetensors", "optimizer", "tokenizer.json", "trainer.json"
    }  # fmt: skip
    assert len(list((folder / "optimizer").iterdir())) == 2
    assert_near(weights(whole, 8), weights(parts, 8))
    assert_near(weights(whole, 12), weights(parts, 12))
    drop(parts, 12)
    train(config, parts, resume=True)
    assert_near(weights(whole, 12), weights(parts, 12))
    assert_same_rows(whole, parts)


def test_every_kind_of_parallelism_saves_what_the_others_read(make_config, tmp_path):
    """Four steps on four ranks with replicas, four more with shards and tensors: rows and weights of one process."""
    settings = ["train.batch_tokens=256", "train.tokens=2048", "train.keep_last=1", "train.keep_every=4"]
    settings += ["train.checkpoint_every=4", "train.eval_every=4", "train.log_every=1", "train.watch_every=2"]
    settings += ["model.num_heads=2", "model.attention_heads=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make_config(*settings), whole)
    codes, out = new_run(4, "", make_config(*settings, "parallel.replicas=2"), parts)
    assert codes == [0] * 4, out
    assert_near(weights(whole, 4), weights(parts, 4))  # a milestone: there in spite of keep_last
    assert_near(weights(whole, 8), weights(parts, 8))
    drop(parts, 8)
    codes, out = ranks.run(4, WORKER, "", "--run", parts, "--resume", "parallel.replicas=1", "parallel.tensor=2")
    assert codes == [0] * 4, out
    assert_near(weights(whole, 8), weights(parts, 8))
    assert_same_rows(whole, parts)
    assert load(parts, "cpu").checkpoint == "step_00000008"  # what eval, generate and serve begin with


def test_signal_to_any_rank_saves_and_a_damaged_share_is_refused(make_config, tmp_path):
    codes, out = new_run(2, "signal", make_config("train.batch_tokens=128"), tmp_path / "run")
    assert codes == [0, 0], out
    assert "stopped by SIGTERM, saved; go on with: gdn2 train" in out
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    assert saved.name == "step_00000005"  # within whose gradients the signal came
    checkpoint.verify(saved)
    share = next((saved / "optimizer").glob("shard-00002*"))
    content = bytearray(share.read_bytes())
    content[-1] ^= 1
    share.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"optimizer/shard-00002\S*: it does not match its checksum"):
        checkpoint.verify(saved)


def test_full_disk_of_one_rank_ends_all_and_keeps_the_older_checkpoint(make_config, tmp_path):
    codes, out = new_run(2, "full disk", make_config("train.checkpoint_every=2", "train.tokens=768"), tmp_path / "run")
    assert codes == [2, 2], out
    assert "step_00000004 could not be written ([Errno 28] No space left on device); the newest whole" in out
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    checkpoint.verify(checkpoint.checkpoints(tmp_path / "run")[0])


@pytest.mark.parametrize(("event", "code"), [("dies", 9), ("hangs", 1)])
def test_lost_rank_ends_the_others_with_a_clear_error(make_config, tmp_path, event, code):
    config = make_config("train.batch_tokens=128", "train.checkpoint_every=2", "parallel.timeout=3")
    began = time.monotonic()
    codes, out = new_run(2, event, config, tmp_path / "run")
    assert codes == [1, code], out
    assert "gdn2: error: rank 0 of 2: another rank ended, or did not answer within parallel.timeout (3 s)" in out
    assert f"go on with: gdn2 train --run {tmp_path / 'run'} --resume" in out
    assert time.monotonic() - began < 60
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step_00000002", "step_00000004"]
