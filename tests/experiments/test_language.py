"""The language experiment on a CPU: it learns text, goes on where it stopped, and asks what it says it asks."""

import json
from dataclasses import replace

import language
import numpy as np
import pytest
import rows
import torch
from corpus import ASKED, Corpus, open_corpus, split_files, write_corpus

from gdn2.data import Shards, load_tokenizer
from gdn2.evaluation.needles import niah_samples
from gdn2.presets import preset


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The small size's folder of text."""
    folder = tmp_path_factory.mktemp("text") / "small"
    write_corpus(folder, language.SIZES["small"].corpus)
    return folder


def small_run(folder, text, *options):
    out = folder / "rows.jsonl"
    places = ["--device", "cpu", "--data", str(text), "--runs", str(folder / "runs"), "--out", str(out)]
    language.main([*places, "--kinds", "recurrent", *options])
    return rows.read(out)


def test_a_model_learns_and_its_row_holds_all_that_it_depends_on(text, tmp_path, capsys):
    """40,960 tokens of 512 kinds: the frequencies of tokens alone give 3.52 bits a byte; seed 0 gave 3.10 and 3.12."""
    (row,) = small_run(tmp_path, text, "--mixers", "gdn2").values()
    bits = [score["bits_per_byte"] for score in row["language"].values()]
    assert bits[0] < 3.3
    assert bits[1] < 3.3  # windows of 2,048, four times the training length
    assert row["loss"][-1]["bits_per_byte"] < row["loss"][0]["bits_per_byte"]
    assert [(cell["task"], cell["length"]) for cell in row["needles"][:4]] == [
        ("niah_single_1", 512), ("niah_single_1", 1_024), ("niah_single_1", 2_048), ("niah_single_2", 512)
    ]  # fmt: skip
    for cell in row["needles"]:
        assert sum(asked for _, asked in cell["by_depth"]) == cell["samples"] == 3
    about = json.loads((text / "corpus.json").read_text())
    assert row["corpus"]["train_sha256"] == about["train_sha256"] == Shards(text).meta.sha256["train.bin"]
    assert (tmp_path / "rows.files.txt").read_text() == (text / "files.txt").read_text()
    assert row["code"] == rows.code()
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == row["run"]
    shown = capsys.readouterr().out
    assert (
        f"| recurrent gdn2 | {bits[0]:.4f} | {bits[1]:.4f} | 1 | 0.004 of 0.004 | {row['parameters'] / 1e6:.2f}M |"
        in shown
    )
    small_run(tmp_path, text, "--mixers", "gdn2", "--dry-run")
    assert "1 rows, 0 missing" in capsys.readouterr().out
    before = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text("")  # the run is there, its row was lost: nothing is trained again
    stamp = (run / "metrics.jsonl").stat().st_mtime_ns
    (again,) = small_run(tmp_path, text, "--mixers", "gdn2").values()
    assert (run / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert again["needles"] == json.loads(before)["needles"]


def test_a_training_that_fails_is_a_row_and_the_grid_goes_on(text, tmp_path, capsys):
    found = small_run(tmp_path, text, "--mixers", "gdn2", "--rates", "1e30", "--tokens", "13312", "--seeds", "2")
    assert len(found) == 2
    assert all("10 steps in a row were not finite" in row["failed"] for row in found.values())
    assert "recurrent gdn2 lr 1e+30 seed 1: stopped at step" in capsys.readouterr().out


def test_text_is_whole_files_apart_and_rows_of_one_kind_each(text):
    about, shards = open_corpus(text, language.SIZES["small"].corpus), Shards(text)
    shards.verify()
    tokenizer = load_tokenizer(text)
    train, val = shards.split("train"), shards.split("val")
    found = train.tokens.reshape(-1, 512)
    kinds = about["rows"]
    assert len(found) == sum(kinds.values())
    needles = found[kinds["source"] : kinds["source"] + kinds["needles"]]
    for row in needles[:20]:
        documents = [d for d in tokenizer.decode(row.tolist()).split("Make sure to memorize it.")[1:] if d]
        assert len(documents) == 1
        assert documents[0].rstrip().endswith(".")
    assert abs(kinds["needles"] / len(found) - 0.25) < 0.01
    names = [line.split("  ") for line in (text / "files.txt").read_text().splitlines()]
    assert len(names) == about["files"]
    assert sum(int(size) for _, size, _ in names) == about["text_bytes"]
    assert val.tokens[-1] == tokenizer.end_of_text
    held_out = tokenizer.decode(val.tokens[: val.offsets[1]].tolist())
    assert held_out not in tokenizer.decode(found[: kinds["source"]].reshape(-1).tolist())
    assert all(len(tokenizer.encode(digit)) == 1 for digit in ("0", "9"))
    assert len(tokenizer.encode("1234567")) == 7


def test_splits_share_no_file_and_neither_is_empty():
    files = [(f"{i:02d}", "x" * 10) for i in range(20)]
    split = split_files(files, 0.1)
    assert (len(split["train"]), len(split["val"])) == (18, 2)
    with pytest.raises(ValueError, match="1 files; expected more"):
        split_files(files[:1], 0.1)


class Copyist(torch.nn.Module):
    """Knows every question's text and says each next token, but for those of the chosen rows' answers."""

    def __init__(self, tokens, spans, wrong):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokens, self.spans, self.wrong, self.at = torch.from_numpy(tokens), spans, wrong, 0

    def forward(self, ids, output_state):
        said = torch.nn.functional.one_hot(ids.roll(-1, 1), 512).float() * 20
        for i in range(len(ids)):
            if self.at + i in self.wrong:
                said[i, self.spans[self.at + i, 1] - 2] = 0  # the place that predicts the answer's last token
        self.at += len(ids)
        return said, None

    def logits(self, hidden):
        return hidden


def test_needles_are_found_by_a_copyist_and_not_where_one_token_is_wrong(text, monkeypatch):
    monkeypatch.setattr(language, "READ_AT_ONCE", 1_100)  # two rows at a time
    with np.load(text / "needles.npz") as arrays:
        tokens, spans = arrays["niah_single_3/512/tokens"].astype(np.int64), arrays["niah_single_3/512/spans"]
    right, nats = language.ask(Copyist(tokens, spans, {1}), tokens, spans)
    assert [bool(row.all()) for row in right] == [True, False, True]
    assert [len(row) - int(row.sum()) for row in right] == [0, 1, 0]
    assert max(map(float, nats[0])) < 1e-5 < float(nats[1][-1])
    tokenizer = load_tokenizer(text)
    corpus = language.SIZES["small"].corpus
    assert set(ASKED) <= {name.split("/")[0] for name in np.load(text / "needles.npz")}
    haystack = "\n\n".join(tokenizer.decode(d.tolist()[:-1]) for d in documents(Shards(text).split("val")))
    for row, (first, last), sample in zip(tokens, spans, niah_samples("niah_single_3", tokenizer, 512, 3, 0, haystack)):
        assert tokenizer.decode(row[:first].tolist()) == sample.prompt
        assert tokenizer.decode(row[first:last].tolist()) == f" {sample.answers[0]}"
        assert last + 128 <= 512
    assert corpus.samples == len(tokens)


def documents(file):
    return np.split(np.asarray(file.tokens), file.offsets[1:-1])


def test_grid_matches_parameters_and_memory_and_keeps_mixers_innermost(text):
    size = language.SIZES["full"]
    about = {"settings": {"vocab_size": 4_096}, "train_sha256": "x", "rows": {}}
    names = [*language.USUAL, *language.chosen("ablations")[1:]]
    settings = list(language.grid(size, ["recurrent", "hybrid"], names, about))
    assert [s["mixer"] for s in settings[: len(names)]] == names
    assert len(settings) == 3 * (2 * len(names) - 1)  # the Transformer is of one kind
    assert len({rows.key_of(s) for s in settings}) == len(settings)
    for setting in settings:
        config = json.loads(json.dumps(setting))["config"]
        assert config["train"]["tokens"] == 30_000_000
    sizes = {}
    for name in names:
        for kind in ("recurrent", "hybrid"):
            with torch.device("meta"):
                model = language.LanguageModel(language.model_of(size, kind, name, 4_096))
            sizes[kind, name] = model.num_parameters()
    assert max(sizes.values()) / min(sizes.values()) < 1.01, sizes
    assert language.model_of(size, "hybrid", "gdn2-scalar-write", 4_096) == replace(
        preset("gdn2-hybrid-10m"), vocab_size=4_096, channel_write=False
    )


def test_folder_of_other_settings_is_refused(text, tmp_path):
    other: Corpus = replace(language.SIZES["small"].corpus, samples=5)
    with pytest.raises(ValueError, match="take another folder"):
        open_corpus(text, other)
    with pytest.raises(ValueError, match=r"holds no corpus\.json"):
        open_corpus(tmp_path, other)
    with pytest.raises(ValueError, match="'nothing_here' is not installed"):
        write_corpus(tmp_path / "new", replace(other, packages=("nothing_here",)))
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        language.main(["--mixers", "linear"])  # no preset of it
    assert "'linear'; expected some of gdn2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        language.main(["--kinds", "hybird"])
    assert "'hybird'" in capsys.readouterr().err
