"""What the commands say to bad input: one line, before anything is lost or overwritten."""

import json
import shutil

import pytest
from command import TINY, call, refusal
from tokenizers import Tokenizer, models


def test_diverged_training_leaves_with_1(shards, tmp_path, capsys):
    arguments = ["train", "--preset", "gdn2-tiny", "--run", tmp_path / "run", f"data.path={shards}", *TINY]
    assert call(*arguments, "optim.lr=1e30", "optim.clip=0", "train.max_bad_steps=2") == 1
    err = capsys.readouterr().err
    assert err.startswith("gdn2: error: stopped at step")
    assert err.count("\n") == 1


def test_prepare_refuses(shards, tmp_path, capsys):
    assert "exists already" in refusal(capsys, "prepare", "--corpus", "stdlib", "--out", shards)
    assert "either files and folders or a corpus" in refusal(capsys, "prepare", "--out", tmp_path / "new")
    assert "does not exist" in refusal(capsys, "prepare", tmp_path / "none", "--out", tmp_path / "new")
    message = refusal(capsys, "prepare", "--corpus", "stdlib", "--out", tmp_path / "new", "--val-share", "0")
    assert "expected a number in (0, 1)" in message


def test_prepare_of_mixed_in_documents_alone(tmp_path):
    assert call("prepare", "--mix-recall", 50, "--val-share", 0.3, "--out", tmp_path / "recall") == 0
    assert json.loads((tmp_path / "recall" / "meta.json").read_text())["sources"] == ["50 recall documents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model was chosen; expected a configuration file, --preset, or --resume"),
        (["a.yaml", "b.yaml"], "configurations a.yaml, b.yaml; expected one file, and overrides as key=value"),
        (["none.yaml"], "configuration 'none.yaml' cannot be read"),
        (["--resume"], "config.yaml' cannot be read"),
        (["--resume", "--preset", "gdn2-tiny"], "--resume takes the run's own configuration"),
        (["--preset", "gdn3"], "preset is 'gdn3'; expected KIND-SIZE"),
        (["--preset", "gdn2-tiny", "model.depth=3"], "unknown key model.depth"),
        (["--preset", "gdn2-tiny", "model=3"], "model is 3; expected a mapping"),
        (["--preset", "gdn2-tiny", "optim.lr=[1"], "override 'optim.lr=[1' is not YAML"),
        (["--preset", "gdn2-tiny", "data.path=nowhere"], "'nowhere' is no folder of token shards"),
    ],
)
def test_train_refuses_before_anything_is_written(tmp_path, capsys, arguments, message):
    run = tmp_path / "run"
    assert message in refusal(capsys, "train", "--run", run, *arguments)
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "RUN", "--tasks", "recal"], "task is 'recal'; expected one of"),
        (["eval", "RUN", "--tasks", "niah_single_1", "--length", "50"], "length is 50 tokens; expected at least"),
        (["eval", "RUN", "--length", "64,0"], "--length is '64,0'; expected integers >= 1, separated by commas"),
        (["eval", "RUN", "--depths", "-1"], "--depths is '-1'; expected numbers of 0 to 100, separated by commas"),
        (["eval", "RUN", "--haystack", "nowhere.txt"], "nowhere.txt"),
        (["eval", "RUN", "--data", "nowhere"], "'nowhere' is no folder of token shards"),
        (["eval", "nowhere"], "'nowhere' holds no checkpoint"),
        (["eval", "RUN", "optim.lr=1"], "setting 'optim.lr=1'; expected model.key=value"),
        (["eval", "RUN", "model.rope_scaling=linear"], "model.rope_scaling is 'linear'; expected one of"),
        (["eval", "RUN", "model.mlp_width=8"], "does not fit the given configuration: blocks.0.mlp.down.weight has"),
        (["eval", "RUN", "--device", "cuda:99"], "--device is 'cuda:99'; expected a device of this machine"),
        (["generate", "RUN", "--prompt", "a", "--device", "tpu"], "--device is 'tpu'; expected auto, cpu, cuda or"),
        (["generate", "nowhere", "--prompt", "a"], "'nowhere' holds no checkpoint"),
        (["generate", "RUN", "--prompt", "a", "--temperature", "-1"], "temperature is -1.0; expected a number >= 0"),
        (["generate", "RUN", "--prompt-file", "none.txt"], "none.txt"),
        (
            ["generate", "RUN", "--prompt", "a", "--draft", "lookup"],
            "--draft is for greedy text; expected --temperature 0",
        ),
        (["generate", "RUN", "--prompt", "a", "--temperature", "0", "--draft", "no"], "'no' holds no checkpoint"),
        (["generate", "RUN", "--prompt", "a", "--weights", "int4"], "--weights is 'int4'; expected one of float32, bf"),
        (["eval", "RUN", "--weights", "INT8"], "--weights is 'INT8'; expected one of float32, bfloat16, int8, fp8"),
        (
            ["generate", "RUN", "--prompt", "a", "--memories", "int8"],
            "--memories is 'int8'; expected float32 or bfloat16",
        ),
        (
            ["generate", "RUN", "--temperature", "0", "--draft", "lookup", "--memories", "bfloat16", "--prompt", "a"],
            "--memories is 'bfloat16' with --draft; expected float32",
        ),
        (["plot", "nowhere"], "'nowhere' holds no metrics.jsonl"),
        (["info", "gdn3"], "preset is 'gdn3'; expected KIND-SIZE"),
        (["info", "nowhere/run"], "model is 'nowhere/run'; expected a preset, or the folder of a run"),
        (["info", "gdn2-tiny", "--context", "0"], "context is 0"),
        (["info", "gdn3", "--compare"], "preset is 'gdn3'; expected KIND-SIZE"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, message):
    assert message in refusal(capsys, *[run if a == "RUN" else a for a in arguments])


def test_eval_refuses_text_of_another_tokenizer(run, shards, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for file in shards.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    words = Tokenizer(models.WordLevel({"<eos>": 0, **{f"word{i}": i for i in range(1, 257)}}))  # 257 too
    words.save(str(other / "tokenizer.json"))
    message = refusal(capsys, "eval", run, "--data", other)
    assert "was prepared with another tokenizer ('bytes') than the model's; expected text prepared with" in message


def test_eval_refuses_altered_text(run, shards, tmp_path, capsys):
    altered = shutil.copytree(shards, tmp_path / "altered")
    data = bytearray((altered / "val.bin").read_bytes())
    data[10] ^= 1
    (altered / "val.bin").write_bytes(data)
    assert "val.bin' does not match its checksum" in refusal(capsys, "eval", run, "--data", altered)


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["eval"]], ids=lambda c: c[0])
def test_damaged_weights_are_refused_and_weights_alone_are_not(run, tmp_path, capsys, command):
    copy = shutil.copytree(run, tmp_path / "run")
    weights = copy / "checkpoints" / "step_00000008" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 64
    weights.write_bytes(data)
    name, *rest = command
    message = refusal(capsys, name, copy, *rest)
    assert "step_00000008 is damaged: model.safetensors: it does not match its checksum" in message
    (weights.parent / "trainer.json").unlink()
    assert call("generate", copy, "--prompt", "a", "--tokens", 2) == 0


def test_usage_errors_leave_with_2(capsys):
    assert call("prepare", "--ou", "x") == 2
    assert call("dance") == 2
    assert call("generate", "run", "--tokens", "0") == 2
    assert "Traceback" not in capsys.readouterr().err
