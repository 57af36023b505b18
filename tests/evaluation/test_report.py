"""Each task runs by its name on a real model; results go to a file that is whole or not there."""

import json
import re
from io import StringIO

import pytest
import torch
from rich.console import Console

from gdn2.config import ModelConfig
from gdn2.data import Shards, load_tokenizer, prepare
from gdn2.evaluation import report, results
from gdn2.evaluation.answers import greedy
from gdn2.evaluation.needles import Haystack, essays, needle_documents
from gdn2.evaluation.retrieval import recall_documents
from gdn2.model import LanguageModel

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Number {i} of the texts. It has two sentences!")
    prepare(folder / "shards", [folder], val_share=0.5)
    return Shards(folder / "shards").split("val")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=257, d_model=8, mlp_width=8, num_layers=1, num_heads=1, key_dim=8))


def run(task, model, val, **changes):
    settings = {"seq_len": 64, "packed": False, "lengths": [], "depths": [], "haystack": None, "tokens": 128}
    settings |= {"passage_data": None}
    settings |= {"samples": 2, "seed": 0, "device": "cpu"}
    return report.evaluate(task, model, BYTES, val, **settings | changes)


@pytest.mark.parametrize("task", report.TASKS)
def test_every_task_runs_and_makes_a_row(task, model, val, tmp_path):
    passage = json.dumps({"context": "The hill is 300 m high.", "question": "How high?", "answers": ["300"]})
    (tmp_path / f"{task}.jsonl").write_text(f"{passage}\n{passage}\n")
    counts = []
    result = run(task, model, val, passage_data=tmp_path, progress=lambda *count: counts.append(count))
    assert counts[-1] == ((128, 128) if task == "perplexity" else (2, 2))
    assert json.loads(json.dumps(result, allow_nan=False)) == json.loads(json.dumps(result))
    assert report.table([result]).row_count >= 1
    about = {"checkpoint": "step_1", "settings": [], "weights": "float32"}
    path = tmp_path / "eval.json"
    results.write(path, {results.name_of(about | result): about | result})
    assert list(results.read(path)) == [results.name_of(about | result)]  # it holds all fields that reading asks for


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_1"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 6])
def test_no_question_was_read_in_training_whatever_integer_its_documents_were_drawn_with(
    task, seed, model, val, monkeypatch
):
    """Corpora of experiments/corpus.py hold documents of seeds 1, 2, 3 and 6."""
    asked = []

    def remember(prompts):
        asked.extend(prompts)
        return ["" for _ in prompts]

    monkeypatch.setattr(report, "greedy", lambda *arguments, **settings: remember)
    run(task, model, val, samples=5, seed=seed)
    needle = re.compile(r"One of the special magic \w+ for \S+ is: \S+\.")
    read = {
        one
        for text in needle_documents(8, 900, BYTES, seed, [task], essays(val, BYTES))
        for one in needle.findall(text)
    }
    found = [needle.findall(prompt) for prompt in asked]
    assert len(found) == 5
    assert all(found)
    assert len(read) >= 8
    assert not read & {one for needles in found for one in needles}
    again = list(asked)
    asked.clear()
    run(task, model, val, samples=5, seed=seed + 1)
    assert not set(again) & set(asked)


def test_length_is_that_of_windows_and_needle_prompts(model, val):
    assert run("perplexity", model, val)["length"] == 64
    assert run("perplexity", model, val, lengths=[100])["length"] == 100
    assert run("niah_single_1", model, val, samples=1)["lengths"] == [report.NEEDLE_LENGTH]
    counts = []
    settings = {"samples": 1, "lengths": [800, 900], "depths": [0, 100]}
    result = run("niah_single_1", model, val, **settings, progress=lambda *count: counts.append(count))
    assert (result["lengths"], result["depths"], counts) == ([800, 900], [0, 100], [(1, 4), (2, 4), (3, 4), (4, 4)])
    assert [len(row) for row in result["grid"]] == [2, 2]


def test_haystack_is_named_and_hashed(model, val):
    own = run("niah_single_2", model, val, samples=1)
    given = run("niah_single_2", model, val, samples=1, haystack=Haystack("An essay. It goes on.", "essays.json"))
    assert (own["haystack"], given["haystack"]) == ("validation documents", "essays.json")
    assert own["haystack_sha256"] != given["haystack_sha256"]
    assert run("niah_single_1", model, val, samples=1)["haystack"] == "one line repeated"


def test_model_answers_greedily_in_order(model):
    prompts = [f"ask {i}" for i in range(5)]
    together = greedy(model, BYTES, 6, batch=2)(prompts)
    assert together == [greedy(model, BYTES, 6)([prompt])[0] for prompt in prompts]


def test_essays_are_whole_documents_from_the_start(val):
    documents = [BYTES.decode(val.tokens[a:b].tolist()) for a, b in zip(val.offsets[:3], val.offsets[1:4])]
    assert essays(val, BYTES).split("\n\n")[:3] == documents
    assert essays(val, BYTES, tokens=int(val.offsets[2])) == "\n\n".join(documents[:2])
    assert essays(val, BYTES, tokens=1) == documents[0]


def test_documents_that_were_mixed_in_are_no_haystack(tmp_path):
    made = [*recall_documents(9, 0), *needle_documents(9, 640, BYTES, 0, ["niah_single_1", "niah_multikey_3"])]
    prepare(tmp_path / "shards", documents={"all": [*made, *(f"Essay {i}. x=1\n" for i in range(9))]}, val_share=0.5)
    text = essays(Shards(tmp_path / "shards").split("val"), BYTES)
    assert set(re.split(r"\n\n+", text.strip())) <= {f"Essay {i}. x=1" for i in range(9)}
    assert "Essay" in text


def test_unknown_task_is_named(model, val):
    with pytest.raises(ValueError, match="task is 'recal'; expected one of perplexity, recall, niah_single_1"):
        run("recal", model, val)


def test_table_keeps_each_result_on_one_line_at_80_columns():
    bucket = {"start": 131_072, "stop": 262_144, "nats": 10.1234, "bits_per_byte": 16.0704}
    perplexity = {"perplexity": 12345.678, "bits_per_byte": 16.0704, "tokens": 262_144, "length": 262_144}
    perplexity |= {"task": "perplexity", "by_position": [bucket]}
    needles = {"percent_by_length": [100.0], "samples": 500, "lengths": [262_144], "haystack": "validation documents"}
    recall = {"task": "recall", "percent": 100.0, "chance_percent": 12.5, "samples": 500, "pairs": 8}
    found = [perplexity, needles | {"task": "niah_multikey_1"}, recall]
    console = Console(file=StringIO(), width=80)
    console.print(report.table(found))
    text = console.file.getvalue()
    for result in ("12345.678, 16.0704 bits/byte", "10.1234 nats, 16.0704 bits/byte", "100.0 %, chance 12.5 %"):
        assert result in text
    assert "…" not in text
