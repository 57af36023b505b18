import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gdn2.config import RunConfig, read_config
from gdn2.data import load_tokenizer
from gdn2.model import LanguageModel
from gdn2.training import checkpoint
from gdn2.training.checkpoint import CheckpointError
from gdn2.training.optim import adamw

MakeConfig = Callable[..., RunConfig]


class Parts:
    """A model one optimizer step from its start, and what `save` takes."""

    def __init__(self, config: RunConfig) -> None:
        torch.manual_seed(0)
        self.config = config
        self.model = LanguageModel(config.model)
        self.optimizer = adamw(self.model, config.optim)
        tokens = torch.randint(257, (2, 9))
        self.model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        self.optimizer.step()

    def save(self, run_dir: Path, step: int) -> Path:
        tokenizer = load_tokenizer("bytes")
        return checkpoint.save(run_dir, step, self.model, self.optimizer, {"step": step}, self.config, tokenizer)


@pytest.fixture
def parts(make_config: MakeConfig) -> Parts:
    return Parts(make_config())


def test_saved_tensors_come_back_bit_for_bit(parts: Parts, tmp_path: Path) -> None:
    folder = parts.save(tmp_path, 1)
    assert checkpoint.verify(folder)["step"] == 1
    other = Parts(parts.config)
    for p in other.model.parameters():
        torch.nn.init.normal_(p)
    other.optimizer.state.clear()
    checkpoint.load(folder, other.model, other.optimizer)
    for (name, p), q in zip(parts.model.named_parameters(), other.model.parameters()):
        assert torch.equal(p, q), name
        for key, value in parts.optimizer.state[p].items():
            assert torch.equal(value, other.optimizer.state[q][key]), (name, key)


def test_checkpoint_is_all_that_model_tokenizer_and_config_need(parts: Parts, tmp_path: Path) -> None:
    folder = parts.save(tmp_path, 1)
    model = LanguageModel.from_checkpoint(folder)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parts.model.parameters()))
    assert read_config(folder) == parts.config
    assert load_tokenizer(folder).name == "bytes"


def test_tied_head_is_stored_once(make_config: MakeConfig, tmp_path: Path) -> None:
    parts = Parts(make_config("model.tie_embeddings=true"))
    model = LanguageModel.from_checkpoint(parts.save(tmp_path, 1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parts.model.parameters()))


def test_nothing_in_a_checkpoint_is_pickled(parts: Parts, tmp_path: Path) -> None:
    names = sorted(p.name for p in parts.save(tmp_path, 1).iterdir())
    assert names == ["config.yaml", "model.safetensors", "optimizer.safetensors", "tokenizer.json", "trainer.json"]


def test_who_may_read_one_file_of_a_checkpoint_may_read_all(parts: Parts, tmp_path: Path) -> None:
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            modes = {p.stat().st_mode & 0o777 for p in parts.save(tmp_path, umask).iterdir()}
        finally:
            os.umask(before)
        assert modes == {0o666 & ~umask}


def test_newest_are_kept_and_left_overs_go(parts: Parts, tmp_path: Path) -> None:
    left_over = tmp_path / "checkpoints" / ".step_00000001"
    left_over.mkdir(parents=True)
    (left_over / "model.safetensors").touch()
    assert checkpoint.checkpoints(tmp_path) == []
    for step in (1, 2, 100_000_000):  # more digits than the name is padded to
        parts.save(tmp_path, step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000002", "step_100000000"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000002", "step_100000000"]


@pytest.mark.parametrize("where", ["save_file", "sha256_of", "flush"])
def test_full_disk_leaves_no_half_checkpoint(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, full)
        with pytest.raises(CheckpointError, match=r"could not be written.*No space left.*there is no older checkpoint"):
            parts.save(tmp_path, 1)
    old = parts.save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, full)
        with pytest.raises(CheckpointError, match=f"the newest whole checkpoint is {re.escape(str(old))}"):
            parts.save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]
    checkpoint.verify(old)


@pytest.mark.parametrize("where", ["save_file", "_digest", "flush"])
def test_kill_while_saving_leaves_the_old_checkpoint_usable(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A kill runs no clean-up: it is an exception that `save` does not handle."""

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    old = parts.save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, kill)
        with pytest.raises(Killed):
            parts.save(tmp_path, 2)
    assert checkpoint.checkpoints(tmp_path) == [old]
    assert checkpoint.verify(old)["step"] == 1
    parts.save(tmp_path, 2)  # what was left lies in nobody's way
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000001", "step_00000002"]


def test_old_checkpoints_outlive_a_failed_save(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        parts.save(tmp_path, step)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError):
        parts.save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.yaml", "tokenizer.json"]
)
def test_damage_is_found_and_the_older_checkpoint_named(parts: Parts, tmp_path: Path, name: str) -> None:
    older, folder = parts.save(tmp_path, 1), parts.save(tmp_path, 2)
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    # A digit of the step in trainer.json stays JSON: only a checksum can tell.
    place = whole.rindex(b"2") if name == "trainer.json" else len(whole) // 2
    flipped[place] ^= 1
    for damaged in (bytes(flipped), whole[: len(whole) // 2], b"", None):
        if damaged is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"is damaged: {name}: .*go on from {re.escape(str(older))}"):
            checkpoint.verify(folder)
    (older / name).unlink()
    with pytest.raises(CheckpointError, match="there is no older checkpoint"):
        checkpoint.verify(older)


def test_optimizer_is_checked_only_where_it_is_used(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parts.save(tmp_path, 1)
    (folder / "optimizer.safetensors").write_bytes(b"")
    assert checkpoint.verify(folder, optimizer=False)["step"] == 1
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(folder.parent)  # a bare name has no grandparent of its own
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*there is no older checkpoint"):
        checkpoint.verify(Path(folder.name), optimizer=False)


def test_trainer_without_its_envelope_is_damage(parts: Parts, tmp_path: Path) -> None:
    folder = parts.save(tmp_path, 1)
    for content in ([], {}, {"trainer": {}, "sha256": "0"}):
        (folder / "trainer.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"is damaged: trainer\.json"):
            checkpoint.verify(folder)


def test_other_model_is_refused(parts: Parts, make_config: MakeConfig, tmp_path: Path) -> None:
    folder = parts.save(tmp_path, 1)
    other = Parts(make_config("model.num_layers=1"))
    with pytest.raises(CheckpointError, match=r"holds other parameters than the model: \['blocks\.1"):
        checkpoint.load(folder, other.model, other.optimizer)


def test_random_state_goes_through_text() -> None:
    torch.manual_seed(1)
    state = json.loads(json.dumps(checkpoint.random_state()))
    first = torch.rand(3)
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(3), first)
