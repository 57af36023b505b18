"""The commands of the README, in order, on a small text."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from io import StringIO

import pytest
import torch
from command import TINY, call, refusal

import gdn2
from gdn2 import LanguageModel
from gdn2.data import load_tokenizer
from gdn2.evaluation.needles import niah_samples
from gdn2.evaluation.report import NEEDLE_SEED
from gdn2.evaluation.retrieval import recall_documents
from gdn2.generate import generate
from gdn2.presets import of_same_size


def kept(run):
    """The results in a run's eval.json, oldest first."""
    return list(json.loads((run / "eval.json").read_text()).values())


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"gdn2 {gdn2.__version__}\n"


def test_module_is_the_command():
    said = subprocess.run([sys.executable, "-m", "gdn2", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"gdn2 {gdn2.__version__}\n"


@pytest.mark.parametrize("command", ["prepare", "train", "eval", "generate", "serve", "export", "info", "plot"])
def test_help_has_an_example_that_keeps_its_line(capsys, command):
    assert call(command, "--help") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith(f"gdn2 {command} ") for line in lines)


def test_train_lists_every_setting_and_preset(capsys):
    assert call("train", "--keys") == 0
    out = capsys.readouterr().out
    assert out.startswith("preset=null\n    all the model's settings at once, one of gdn2-1.3b,")
    assert "gdn2-hybrid-tiny" in out
    assert "\noptim.clip=1.0\n    largest gradient norm; 0 turns clipping off\n" in out
    assert "\nseed=0\n" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_help_lists_every_command(capsys):
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert all(
        f"\n  {command} " in out
        for command in ["prepare", "train", "eval", "generate", "serve", "export", "info", "plot"]
    )
    assert "--install-completion" in out


def test_prepare_mixes_in_recall_and_needle_documents(shards):
    meta = json.loads((shards / "meta.json").read_text())
    assert meta["train"]["documents"] + meta["val"]["documents"] == 85
    assert meta["sources"][1:] == ["20 recall documents", "5 needle documents: niah_single_1"]
    text = b"".join((shards / f"{split}.bin").read_bytes()[::2] for split in ("train", "val"))  # uint16: byte, 0
    assert text.count(b"of the texts.") == 60
    assert text.count(b"special magic number for") == 10
    assert next(recall_documents(20, 0)).encode() in text
    for seed in (0, 1):  # what eval asks for, with the seed of the text too, was not read in training
        asked = niah_samples("niah_single_1", load_tokenizer("bytes"), 640, 5, NEEDLE_SEED.format(seed))
        assert not any(answer.encode() in text for sample in asked for answer in sample.answers)


def test_eval_shows_and_keeps_results(run, capsys):
    assert call("eval", run, "--tasks", "perplexity,recall", "--samples", 4) == 0
    out = capsys.readouterr().out
    assert "bits/byte" in out
    assert "chance 12.5 %" in out
    first = {result["task"]: result for result in kept(run)}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = [row for row in rows if row["kind"] == "val"][-1]
    # The same windows as training's last validation; float32 sums over batches of another size.
    assert first["perplexity"]["nats"] == pytest.approx(validation["loss"], rel=1e-5)
    assert first["perplexity"]["bits_per_byte"] == pytest.approx(validation["bits_per_byte"], rel=1e-5)
    assert first["perplexity"]["length"] == 32
    assert first["perplexity"]["checkpoint"] == "step_00000008"
    assert 0 <= first["recall"]["percent"] <= 100
    # Another call adds its results, and longer windows than the training's are fine.
    before = kept(run)
    assert call("eval", run, "--tasks", "perplexity", "--length", 100, "--tokens", 300) == 0
    *others, second = kept(run)
    assert (second["length"], second["tokens"]) == (100, 300)
    assert others == before


def test_eval_adds_another_measurement_and_replaces_the_same(run, shards, tmp_path, capsys):
    """The commands of docs/evaluation.md: lengths, a heat map behind drawn depths, rounded weights, another text."""
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "eval.json").unlink(missing_ok=True)
    other = tmp_path / "other"
    (tmp_path / "a.txt").write_text("Other text, of which there is enough for a window.\n")
    (tmp_path / "b.txt").write_text("And other text again, of which there is enough too.\n")
    arguments = ["prepare", tmp_path / "a.txt", tmp_path / "b.txt", "--out", other, "--val-share", 0.5]
    assert call(*arguments) == 0
    needles = ["--tasks", "niah_single_1", "--length", 640, "--samples", 1]
    commands = [
        ["--tasks", "perplexity"],
        ["--tasks", "perplexity", "--length", 40],
        ["--tasks", "perplexity", "--weights", "int8"],
        ["--tasks", "perplexity", "model.rope_base=500"],
        ["--tasks", "perplexity", "--data", other],
        needles,
        [*needles, "--depths", "0,100"],
        [*needles, "--seed", 1],
    ]
    for number, command in enumerate([*commands, *commands], 1):
        assert call("eval", copy, *command) == 0
        assert len(kept(copy)) == min(number, len(commands)), command
    assert call("report", copy, "--out", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text()
    for name in json.loads((copy / "eval.json").read_text()):
        where, _, about = name.partition("; ")
        assert any(f"{where}{unit}; {about}" in page for unit in ("", ", %")), name
    assert page.count("bits per byte, windows of 32; ") == 4


def test_eval_takes_other_rotary_positions_for_longer_texts(run, capsys):
    losses = []
    for settings in (
        [],
        ["model.rope_scaling=ntk", "model.rope_factor=1"],
        ["model.rope_scaling=ntk", "model.rope_factor=8"],
    ):
        assert call("eval", run, *settings, "--tasks", "perplexity", "--length", 100, "--tokens", 300) == 0
        result = kept(run)[-1]
        assert result["settings"] == settings
        losses.append(result["nats"])
    # A base that stays the same is no other model; what eight times the length does to this one is small, and there.
    assert losses[0] == losses[1] != losses[2] == pytest.approx(losses[0], rel=0.1)


def test_eval_of_a_packed_run_is_its_last_validation(shards, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "--preset", "gdn2-hybrid-tiny", "--run", run, f"data.path={shards}", *TINY]
    assert call(*arguments, "data.packed=true", "train.tokens=256", "train.eval_tokens=9999") == 0
    assert call("eval", run, "--tasks", "perplexity") == 0
    score = kept(run)[-1]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = [row for row in rows if row["kind"] == "val"][-1]
    # float32 sums over batches of another size
    assert score["nats"] == pytest.approx(validation["loss"], rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(validation["bits_per_byte"], rel=1e-5)


def test_eval_asks_for_needles(run, capsys):
    assert call("eval", run, "--tasks", "niah_single_2", "--length", 700, "--samples", 2) == 0
    assert "2 prompts of 700 tokens" in " ".join(capsys.readouterr().out.split())
    assert (
        call("eval", run, "--tasks", "niah_single_1", "--length", "600,700", "--depths", "0,99.5", "--samples", 1) == 0
    )
    result = kept(run)[-1]
    assert (result["lengths"], result["depths"]) == ([600, 700], [0, 99.5])


def test_generate_continues_and_repeats_under_a_seed(run, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert call("generate", run, "--prompt", "Number ", "--tokens", 30, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("Number ")
    assert texts[0] == texts[1] != texts[2]


def test_generate_takes_several_prompts_and_a_file(run, tmp_path, capsys):
    (tmp_path / "story.txt").write_text("a story")
    prompts = ["--prompt", "one", "--prompt", "two", "--prompt-file", tmp_path / "story.txt"]
    assert call("generate", run, *prompts, "--tokens", 4, "--temperature", 0) == 0
    out = capsys.readouterr().out
    for number, prompt in enumerate(["one", "two", "a story"], 1):
        assert f"--- {number} of 3 ---\n{prompt}" in out


def test_generate_reads_standard_input(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", StringIO("from a pipe"))
    assert call("generate", run, "--tokens", 4) == 0
    assert capsys.readouterr().out.startswith("from a pipe")


def test_generate_names_a_file_that_is_not_text(run, tmp_path, capsys):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    message = refusal(capsys, "generate", run, "--prompt-file", tmp_path / "picture.png")
    assert message == f"{str(tmp_path / 'picture.png')!r} is not UTF-8 text"


def test_generate_stops_before_a_string(run, capsys):
    everything = [argument for byte in range(128) for argument in ("--stop", chr(byte))]
    assert call("generate", run, "--prompt", "abc", "--tokens", 50, "--seed", 0, *everything) == 0
    assert all(ord(character) > 127 for character in capsys.readouterr().out[3:-1])


def test_weights_and_memories_are_kept_in_what_is_asked_for(run, capsys):
    model, prompt = LanguageModel.from_checkpoint(run), [*b"Number "]
    forms = {
        ("--weights", "float32"): (model, None),
        ("--memories", "bfloat16"): (model, torch.bfloat16),
        ("--weights", "int8"): (copy.deepcopy(model).quantize("int8"), None),
        ("--weights", "fp8"): (copy.deepcopy(model).quantize("fp8"), None),
        ("--weights", "bfloat16", "--memories", "bfloat16"): (copy.deepcopy(model).bfloat16(), torch.bfloat16),
    }
    for options, (form, memory) in forms.items():
        assert call("generate", run, "--prompt", "Number ", "--tokens", 12, "--temperature", 0, *options) == 0
        rows = generate(form, [prompt], 12, temperature=0, stop_tokens=[256], memory_dtype=memory)
        assert capsys.readouterr().out == "Number " + load_tokenizer("bytes").decode([t for (t,) in rows]) + "\n"
    nats = {}
    for kind in ("float32", "int8", "fp8", "bfloat16"):
        assert call("eval", run, "--tasks", "perplexity", "--weights", kind) == 0
        result = kept(run)[-1]
        assert result["weights"] == kind
        nats[kind] = result["nats"]
    for kind in ("int8", "fp8", "bfloat16"):  # each its own numbers, none far off
        assert 1e-7 < abs(nats[kind] / nats["float32"] - 1) < 1e-2
    assert len(set(nats.values())) == 4


def test_info_of_a_preset_and_of_a_run(run, capsys):
    assert call("info", "gdn2-1.3b") == 0
    assert "1,302,638,112" in capsys.readouterr().out
    assert call("info", run, "--context", 64) == 0
    assert "for sequences of 64 tokens" in capsys.readouterr().out


def test_info_compares_every_model_of_a_size(capsys):
    assert call("info", "mamba3-350m", "--compare") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(of_same_size("gdn2-350m"))
    assert len(lines) == 16 + 2
    assert call("info", "--compare") == 0
    assert "gdn2-1.3b                1,302,638,112  1,450,096,416      4,718,592 " in capsys.readouterr().out


def test_plot_draws_a_picture(run, tmp_path, capsys):
    for arguments, path in (([], run / "plot.png"), (["--out", tmp_path / "loss.png"], tmp_path / "loss.png")):
        assert call("plot", run, *arguments) == 0
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize("stop", [[], ["--stop", "e"]])
def test_draft_gives_the_same_text_in_fewer_passes(run, capsys, stop):
    texts = []
    for draft in ([], ["--draft", run], ["--draft", "lookup"]):
        arguments = ["--prompt", "Number 5 of the", "--tokens", 40, "--temperature", 0, *stop, *draft]
        assert call("generate", run, *arguments) == 0
        shown = capsys.readouterr()
        texts.append(shown.out)
        if draft == ["--draft", run] and not stop:  # its own draft is right all along: up to nine tokens a pass
            said, passes = map(int, re.findall(r"\d+", shown.err))
            assert passes < said / 4
    assert texts[0] == texts[1] == texts[2]


def test_resume_goes_on_and_takes_overrides(shards, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", "--preset", "gdn2-tiny", "--run", run, f"data.path={shards}", *TINY]
    assert call(*arguments, "optim.schedule=constant") == 0
    assert call("train", "--run", run, "--resume", "train.tokens=1152") == 0
    assert call("train", "--run", run, "--resume", "train.tokens=1280") == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 10
    assert sum("resumed" in row.get("event", "") for row in rows) == 2


def test_train_takes_a_file(shards, tmp_path):
    config = tmp_path / "lr=1e-3.yaml"  # a file, for all its "="
    config.write_text(f"preset: gdn2-tiny\nseed: 3\ndata: {{path: {shards}}}\n")
    run = tmp_path / "run"
    assert call("train", config, "--run", run, *TINY, "train.tokens=128") == 0
    assert "seed: 3" in (run / "config.yaml").read_text()


@pytest.mark.parametrize("preset", of_same_size("gdn2-tiny"))
def test_every_model_trains_and_generates(shards, tmp_path, capsys, preset):
    run = tmp_path / "run"
    settings = [*TINY, "train.tokens=1280", "optim.lr=3e-2", "train.log_every=1", "train.checkpoint_every=0"]
    assert call("train", "--preset", preset, "--run", run, f"data.path={shards}", *settings) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 10
    # From guessing among 257 bytes, 5.55 nats, to the few that the text has: 10 steps were seen to reach 3.5 to 4.1.
    assert losses[-1] < losses[0] - 1
    assert call("generate", run, "--prompt", "Number ", "--tokens", 3) == 0
    assert "Number " in capsys.readouterr().out


@pytest.mark.parametrize(
    "ablation", ["channel_erase=false", "channel_write=false", "negative_eigenvalues=true", "decay_lower_bound=-5"]
)
def test_every_ablation_trains(shards, tmp_path, ablation):
    run = tmp_path / "run"
    arguments = ["train", "--preset", "gdn2-tiny", "--run", run, f"data.path={shards}", *TINY, "train.tokens=256"]
    assert call(*arguments, f"model.{ablation}") == 0
    assert ablation.replace("=", ": ") in (run / "config.yaml").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_interrupted_training_is_saved_and_its_code_tells_who_stopped_it(shards, tmp_path, capsys, number, code):
    run = tmp_path / "run"
    arguments = ["train", "--preset", "gdn2-tiny", "--run", run, f"data.path={shards}", *TINY, "train.tokens=100000000"]

    def interrupt():
        while not (run / "metrics.jsonl").exists():
            pass
        os.kill(os.getpid(), number)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    assert call(*arguments) == code
    watcher.join()
    (command,) = re.findall(r"go on with: gdn2 (.*)", capsys.readouterr().out)
    assert call(*command.split(), "optim.lr=1") == 2  # the command finds the checkpoint, and compares with it
    assert "optim.lr: was 0.0004, is 1.0" in capsys.readouterr().err
    assert list((run / "checkpoints").iterdir())
