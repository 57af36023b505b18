"""The command in this process, and settings for a run of a second."""

import pytest

from gdn2.cli import main

TINY = ["model.d_model=16", "model.mlp_width=16", "model.num_layers=2", "model.num_heads=1", "model.key_dim=8"]
TINY += ["model.value_dim=8", "model.attention_heads=1", "data.seq_len=32", "train.batch_tokens=128"]
TINY += ["train.micro_batch=4", "train.tokens=1024", "train.eval_tokens=64", "train.checkpoint_every=4"]


def call(*arguments):
    """The exit code of `gdn2 ARGUMENTS`."""
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return leaving.value.code


def refusal(capsys, *arguments):
    """The line that `gdn2 ARGUMENTS` leaves with, checked to be one, with exit code 2."""
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("gdn2: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    return err.removeprefix("gdn2: error: ").strip()
