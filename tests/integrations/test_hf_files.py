"""Saving and loading in transformers' form: bit for bit, in the right precision, without running a folder's code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import MODELS, prompt, small_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)
from twins import exported

from gdn2.integrations.hf import STUB, Gdn2Config, Gdn2ForCausalLM

PROMPTS = [prompt(3), prompt(20, seed=1), [5] * 11]


@pytest.fixture
def folder(tmp_path):
    _, twin = exported(double=False)
    twin.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [False, True])
def test_loaded_model_is_the_saved_one_bit_for_bit(tmp_path, name, tied):
    model, twin = exported(name, double=False, tie_embeddings=tied)
    twin.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not list(loaded.buffers())
    ids = torch.tensor([PROMPTS[1]])
    assert torch.equal(loaded(input_ids=ids).logits, twin(input_ids=ids).logits)
    back = loaded.language_model()
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))
    assert (loaded.lm_head.weight is loaded.model.embedding.weight) == tied
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(input_ids=ids).last_hidden_state, loaded.model(input_ids=ids).last_hidden_state)


def test_missing_weights_are_initialised_and_no_loaded_one_is_touched(tmp_path):
    from safetensors.torch import load_file, save_file

    model, twin = exported(double=False, decay_lower_bound=-5.0)
    twin.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = ["model.blocks.0.mixer.gates.decay.rate", "lm_head.weight", "model.blocks.0.mixer.conv_k"]
    for name in missing:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(missing)
    for name, parameter in loaded.named_parameters():
        assert parameter.isfinite().all()
        if name not in missing:
            assert torch.equal(parameter, twin.get_parameter(name)), name
    rate = loaded.get_parameter(missing[0])
    assert bool((rate >= 0).all()) and bool((rate <= 2.8).all())  # log U(1, 16)  # noqa: PT018
    assert model.config.decay_lower_bound == -5.0


def test_what_must_be_float32_stays_so_in_bf16(folder):
    kept = ("rate", "delta", "norm")
    for loaded in (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16),
    ):
        for name, parameter in loaded.named_parameters():
            wide = name.split(".")[-1] in kept or name.split(".")[-2].endswith("norm")
            assert (parameter.dtype == torch.float32) == wide, name
        assert loaded(input_ids=torch.tensor([PROMPTS[1]])).logits.isfinite().all()
    cast = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    assert cast.get_parameter("model.blocks.0.mixer.gates.decay.rate").dtype == torch.float32


def test_configuration_survives_and_names_what_tools_read(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.model_config() == small_model(**MODELS["window"]).config
    assert config.layer_types == ["linear_attention", "sliding_attention"]
    assert config.mixer == "gdn2"
    for key in ("tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"):
        assert hasattr(config, key)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (257, 32, 2)
    assert config.max_position_embeddings == 2048
    assert Gdn2Config(gdn2=config.gdn2 | {"window": None}).layer_types[1] == "full_attention"
    assert "gdn2" in Gdn2Config().to_diff_dict()  # today's defaults are written down too
    with pytest.raises(ValueError, match=r"unknown key gdn2\.d_modle"):
        Gdn2Config(gdn2={"d_modle": 3})
    with pytest.raises(ValueError, match=r"model\.num_heads is 0"):
        Gdn2Config(gdn2=config.gdn2 | {"num_heads": 0})


def test_resized_vocabulary_survives_saving(tmp_path):
    _, twin = exported(double=False)
    twin.resize_token_embeddings(300, mean_resizing=False)
    twin.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.language_model().config.vocab_size == 300
    ids = torch.tensor([PROMPTS[1]])
    assert torch.equal(loaded(input_ids=ids).logits, twin(input_ids=ids).logits)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
said = set()
for source, target in zip(sys.argv[1:], sys.argv[2:]):
    assert "gdn2" not in sys.modules or said
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    assert type(model).__module__ == "gdn2.integrations.hf", type(model)
    model.save_pretrained(target)
    model.config.save_pretrained(target)
    said.add(model(input_ids=torch.tensor([[1, 2, 3]])).logits.double().sum().item())
print(len(said))
"""


def test_stub_loads_without_our_import_and_survives_saving_again(folder, tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    again = tmp_path / "again"
    arguments = [sys.executable, "-W", "ignore", "-c", LOAD, str(folder), str(again), str(tmp_path / "third")]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1\n"
    names = {"config.json", "generation_config.json", "model.safetensors", "modeling_gdn2.py"}
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()} == names
    assert (again / "modeling_gdn2.py").read_text() == STUB
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, again)]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    assert configs[0]["auto_map"]["AutoModelForCausalLM"] == "modeling_gdn2.Gdn2ForCausalLM"


def test_nothing_in_the_folder_is_run_once_we_are_imported(folder):
    (folder / "modeling_gdn2.py").write_text("raise SystemExit('the stub was run')\n")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is Gdn2ForCausalLM
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_pushing_uploads_the_whole_export(monkeypatch):
    from huggingface_hub import HfApi

    uploaded = set()

    def remember(self, *_, operations=(), folder_path=None, **__):
        uploaded.update(operation.path_in_repo for operation in operations)
        uploaded.update(path.name for path in Path(folder_path or os.devnull).glob("*"))

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="someone/model"))
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(HfApi, "create_commit", remember)
    monkeypatch.setattr(HfApi, "upload_folder", remember)
    _, twin = exported(double=False)
    twin.push_to_hub("someone/model")
    assert {"config.json", "model.safetensors", "modeling_gdn2.py"} <= uploaded
