"""An exported folder gives the texts and ids that the run gives, and is written whole or not at all."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_run import BYTES, save_run
from small import MODELS, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gdn2.cli import main
from gdn2.data import load_tokenizer
from gdn2.generate import generate_text
from gdn2.integrations.export import export, transformers_tokenizer

TEXT = "naïve – 日本 <|endoftext|> \x00\n\t  x"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(["the cat and the hat and the rat in the bath"] * 9, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    inner.save(str(path))
    return load_tokenizer(path)


def run_command(*arguments):
    with pytest.raises(SystemExit) as leaving:
        main(["export", *map(str, arguments)])
    return leaving.value.code


def test_exported_run_says_what_the_run_says(tmp_path, capsys):
    model = small_model(**MODELS["window"])
    save_run(tmp_path / "run", model)
    assert run_command(tmp_path / "run", tmp_path / "exported" / "first") == 0
    folder = tmp_path / "exported" / "first"
    assert capsys.readouterr().out.strip() == str(folder)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_gdn2.py",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    twin = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["naïve", "def main(", "x"]
    out = twin.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=20)
    said = [tokenizer.decode(row, skip_special_tokens=True) for row in out]
    ours = zip(*generate_text(model, BYTES, prompts, 20, temperature=0))
    assert said == [prompt + "".join(new) for prompt, new in zip(prompts, ours)]
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == (256, 256)
    assert twin.config.max_position_embeddings == tokenizer.model_max_length == 128
    card = (folder / "README.md").read_text()
    assert f"{model.num_parameters():,} parameters" in card
    assert "corpora" not in card


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30))
def test_byte_level_ids_and_texts_are_ours(text):
    tokenizer = transformers_tokenizer(BYTES, 100)
    for words in (text, TEXT):
        assert tokenizer(words)["input_ids"] == BYTES.encode(words)
        assert tokenizer.decode(BYTES.encode(words)) == words


def test_saved_tokenizers_give_the_same_ids(tmp_path, bpe):
    for name, own in (("bytes", BYTES), ("bpe", bpe)):
        transformers_tokenizer(own, 100).save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        for text in (TEXT, "the cat in the hat", "", " the"):
            assert loaded(text)["input_ids"] == own.encode(text)
            assert loaded.decode(own.encode(text)) == text
        assert (loaded.eos_token_id, loaded.pad_token_id, loaded.padding_side) == (own.end_of_text,) * 2 + ("left",)
        assert loaded.decode([*BYTES.encode("a"), own.end_of_text], skip_special_tokens=True) != ""
    again = load_tokenizer(tmp_path / "bpe")
    assert again.encode(TEXT) == bpe.encode(TEXT)
    assert again.end_of_text == bpe.end_of_text


def test_split_characters_decode_as_ours():
    tokenizer = transformers_tokenizer(BYTES, 100)
    ids = BYTES.encode("日")[:2]
    assert tokenizer.decode(ids) == BYTES.decode(ids) == "�"


def test_length_for_tools_is_the_one_asked_for(tmp_path):
    model = small_model()
    config = save_run(tmp_path / "run", model)
    export(model, BYTES, config, tmp_path / "out", max_length=9_000)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 9_000
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # all for the same readers


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, capsys, monkeypatch, bpe):
    model = small_model()
    config = save_run(tmp_path / "run", model)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("precious")
    assert run_command(tmp_path / "run", tmp_path / "there") == 2
    assert "exists already; expected a folder that does not" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine"]
    assert run_command(tmp_path / "nowhere", tmp_path / "out") == 2
    with pytest.raises(ValueError, match=f"the tokenizer has {bpe.vocab_size} ids; expected at most the model's 257"):
        export(model, bpe, config, tmp_path / "out")
    with pytest.raises(ValueError, match="max_length is 0; expected an integer >= 1"):
        export(model, BYTES, config, tmp_path / "out", max_length=0)
    monkeypatch.setattr("gdn2.integrations.export._card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, BYTES, config, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


def test_weights_are_those_of_the_run(tmp_path):
    model = small_model(tie_embeddings=True)
    config = save_run(tmp_path / "run", model)
    twin = AutoModelForCausalLM.from_pretrained(export(model, BYTES, config, tmp_path / "out"))
    back = twin.language_model().state_dict()
    assert all(torch.equal(back[name], weight) for name, weight in model.state_dict().items())
