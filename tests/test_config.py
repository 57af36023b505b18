"""Configuration: what is accepted, what is refused, and that the message names the key, its value and the remedy."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdn2.config import (
    ConfigError,
    ModelConfig,
    OptimConfig,
    RunConfig,
    build,
    documented_keys,
    load_run,
    override,
    read_config,
    to_dict,
    write_config,
)
from gdn2.presets import preset

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


def refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run(None, re.split(r" (?=\S+=)", assignment), preset)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.d_model=0", "model.d_model is 0; expected an integer >= 1"),
        ("model.mixer=gru", "model.mixer is 'gru'; expected one of gdn2, kda, gdn, deltanet, linear, mamba2, mamba3"),
        ("model.cell=[]", "model.cell is (); expected a non-empty list of mixer or attention"),
        ("model.cell=[mamba]", "model.cell is ('mamba',); expected a non-empty list"),
        ("model.num_value_heads=17", "model.num_value_heads is 17; expected a multiple of num_heads (16)"),
        ("model.cell=[attention] model.attention_heads=7", "model.attention_heads is 7; expected a divisor of d_model"),
        (
            "model.mixer=kda model.channel_erase=false",
            "model.channel_erase is False; expected true with the mixer kda; it is an option of gdn2",
        ),
        (
            "model.mixer=gdn model.num_value_heads=32",
            "model.num_value_heads is 32; expected null with the mixer gdn; it is an option of gdn2",
        ),
        ("model.mixer=gdn model.decay_lower_bound=-5.0", "expected null with the mixer gdn; it is an option of gdn2,"),
        ("model.mixer=mamba2 model.negative_eigenvalues=true", "expected false with the mixer mamba2"),
        ("model.mixer=mamba3 model.conv_width=3", "model.conv_width is 3; expected 4 with the mixer mamba3"),
        ("model.mimo_rank=4", "model.mimo_rank is 4; expected 1 with the mixer gdn2; it is an option of mamba3"),
        ("model.mimo_rank=0", "model.mimo_rank is 0; expected an integer >= 1"),
        ("model.decay_lower_bound=0", "model.decay_lower_bound is 0.0; expected a finite number < 0, or null"),
        (
            "model.mixer=mamba3 model.rope_fraction=0.3",
            "model.rope_fraction is 0.3; expected an even share of key_dim (128), 2 channels or more",
        ),
        ("model.rope_scaling=linear", "model.rope_scaling is 'linear'; expected one of none, ntk, yarn"),
        ("model.rope_factor=2", "model.rope_factor is 2.0; expected a finite number >= 1, and 1 without rope_scaling"),
        ("model.rope_scaling=ntk model.rope_factor=.inf", "model.rope_factor is inf; expected a finite number >= 1"),
        (
            "model.rope_scaling=ntk model.rope_factor=8",
            "model.rope_scaling is 'ntk'; expected 'none' without attention in model.cell",
        ),
        (
            "model.cell=[attention] model.channel_erase=false",
            "model.channel_erase is False; expected true without a mixer in model.cell",
        ),
        ("model.rope_length=0", "model.rope_length is 0; expected an integer >= 1"),
        ("model.window=0", "model.window is 0; expected an integer >= 1, or null"),
        ("model.rope_base=1", "model.rope_base is 1.0; expected a finite number > 1"),
        ("model.norm_eps=0", "model.norm_eps is 0.0; expected a finite number > 0"),
        ("data.seq_len=0", "data.seq_len is 0; expected an integer >= 1"),
        ("optim.lr=0", "optim.lr is 0.0; expected a finite number > 0"),
        ("optim.lr=.nan", "optim.lr is nan; expected a finite number > 0"),
        ("optim.lr=.inf", "optim.lr is inf; expected a finite number > 0"),
        ("optim.eps=.inf", "optim.eps is inf; expected a finite number > 0"),
        ("optim.clip=.inf", "optim.clip is inf; expected a finite number >= 0"),
        ("model.rope_base=.inf", "model.rope_base is inf; expected a finite number > 1"),
        ("model.norm_eps=.inf", "model.norm_eps is inf; expected a finite number > 0"),
        ("optim.min_lr_ratio=1.5", "optim.min_lr_ratio is 1.5; expected a number in [0, 1]"),
        ("optim.schedule=step", "optim.schedule is 'step'; expected cosine, wsd or constant"),
        ("optim.weight_decay=-1", "optim.weight_decay is -1.0; expected a finite number >= 0"),
        ("optim.clip=-1", "optim.clip is -1.0; expected a finite number >= 0"),
        ("optim.betas=[0.9,1.0]", "optim.betas is (0.9, 1.0); expected two numbers in [0, 1)"),
        ("optim.betas=[0.9]", "optim.betas is [0.9]; expected a list of 2 values"),
        ("optim.eps=0", "optim.eps is 0.0; expected a finite number > 0"),
        ("optim.decay_tokens=9", "optim.decay_tokens is 9; expected 0 with the schedule cosine"),
        ("optim.warmup_tokens=3000000", "optim.warmup_tokens is 3000000; expected fewer than the run's 2007040 tokens"),
        ("optim.schedule=wsd optim.decay_tokens=3000000", "optim.decay_tokens is 3000000; expected no more than"),
        ("train.tokens=0", "train.tokens is 0; expected an integer >= 1"),
        ("train.sample_tokens=0", "train.sample_tokens is 0; expected an integer >= 1"),
        ("train.eval_every=-1", "train.eval_every is -1; expected an integer >= 0"),
        ("train.device=tpu", "train.device is 'tpu'; expected auto, cpu, cuda or cuda:N"),
        ("train.precision=fp16", "train.precision is 'fp16'; expected auto, fp32 or bf16"),
        ("train.batch_tokens=8193", "train.batch_tokens is 8193; expected a multiple of"),
        ("seed=-1", "seed is -1; expected an integer in [0, 2**63)"),
        # shape and type of the values
        ("model.depth=3", "unknown key model.depth; expected one of attention_heads"),
        ("modle.d_model=3", "unknown key modle; expected one of data"),
        ("model.d_model=big", "model.d_model is 'big'; expected int"),
        ("model.d_model=true", "model.d_model is True; expected int"),
        ("train.recompute=yes", "train.recompute is True; expected text; YAML's words yes, no, on and off need quotes"),
        ("model.d_model=1.5", "model.d_model is 1.5; expected int"),
        ("model.cell=mixer", "model.cell is 'mixer'; expected a list"),
        ("model.tie_embeddings=1", "model.tie_embeddings is 1; expected bool"),
        ("optim.lr=fast", "optim.lr is 'fast'; expected float"),
        ("model=3", "model is 3; expected a mapping of keys to values"),
        ("preset=gdn2-tiny model=3", "model is 3; expected a mapping of keys to values"),
        ("preset=gdn2-tiny model=[1]", "model is [1]; expected a mapping of keys to values"),
        ("data={1: 2, path: x, b: 3}", "unknown key data.1; expected one of packed"),
        ("optim.lr=[1", "override 'optim.lr=[1' is not YAML: while parsing a flow sequence"),
        ("optim.lr=2024-13-01", "override 'optim.lr=2024-13-01' is not YAML: month must be in 1..12"),
        ("preset=3", "preset is 3; expected the name of a model preset"),
        ("preset=gpt", "preset is 'gpt'; expected KIND-SIZE"),
        ("model.d_model", "override 'model.d_model'; expected key.sub=value"),
        ("=3", "override '=3'; expected key.sub=value"),
        ("seed=1 seed.x=3", "override 'seed.x=3': seed holds a value, not keys"),
    ],
)
def test_bad_value_is_refused_by_name(assignment: str, message: str) -> None:
    refused(assignment, message)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"run\.yaml' cannot be read: No such file"):
        load_run(path, [], preset)
    for content in (b"a: [", b"\x89PNG\xff", b"[" * 2_000):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"run\.yaml' is not YAML: [^\n]*$"):
            load_run(path, [], preset)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="holds list; expected keys and values"):
        load_run(path, [], preset)


def test_override_wins_over_file_and_file_over_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: gdn2-tiny\nmodel: {num_layers: 3, d_model: 64}\noptim: {lr: 1e-3}\n")
    config = load_run(path, ["model.num_layers=2", "train.tokens=1e6", "model.window=null"], preset)
    assert (config.model.num_layers, config.model.d_model) == (2, 64)
    assert config.model.vocab_size == preset("gdn2-tiny").vocab_size
    assert config.model.window is None
    assert config.optim.lr == 1e-3  # YAML reads 1e-3 as text
    assert config.train.tokens == 1_000_000


def test_override_leaves_its_input_alone() -> None:
    values = {"a": {"b": 1}}
    assert override(values, ["a.b=2", "c=[1]"]) == {"a": {"b": 2}, "c": [1]}
    assert values == {"a": {"b": 1}}


def test_yaml_round_trip_keeps_every_field() -> None:
    config = RunConfig(model=preset("gdn2-hybrid-tiny"), seed=3)
    assert build(RunConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_written_configuration_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path, RunConfig())
    plain = Path.write_text

    def full(path: Path, text: str, **more: str) -> None:
        plain(path, text[: len(text) // 2], **more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_config(tmp_path, RunConfig(seed=3))
    assert read_config(tmp_path) == RunConfig()


def test_documented_keys_are_all_that_a_run_takes_with_their_defaults() -> None:
    keys = list(documented_keys())
    assert load_run(None, [f"{key}={default}" for key, default, _ in keys], preset) == RunConfig()
    assert {key for key, _, _ in keys} == set(dotted(to_dict(RunConfig())))
    assert {key: doc for key, _, doc in keys}["train.tokens"] == "tokens to train on, rounded up to whole steps"


def dotted(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield from dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def test_configuration_is_frozen_and_documented() -> None:
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    for section in (config.model, config.data, config.optim, config.train):
        assert all(f.metadata["doc"] for f in dataclasses.fields(section))


def test_steps_round_up_to_whole_batches() -> None:
    config = load_run(None, ["train.tokens=16385"], preset)
    assert config.train.batch_tokens == 8192
    assert config.steps == 3


def test_layer_kinds_repeat_the_cell() -> None:
    config = ModelConfig(num_layers=5, cell=("mixer", "attention"))
    assert config.layer_kinds == ("mixer", "attention", "mixer", "attention", "mixer")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_configuration_is_valid(path: Path) -> None:
    assert load_run(path, [], preset).steps > 0


def test_types_are_checked_however_a_configuration_is_made():
    with pytest.raises(ConfigError, match=r"model\.num_layers is 1\.5; expected int"):
        ModelConfig(num_layers=1.5)
    with pytest.raises(ConfigError, match=r"model\.d_model is '5'; expected int"):
        ModelConfig(d_model="5")
    with pytest.raises(ConfigError, match=r"model is {}; expected ModelConfig"):
        RunConfig(model={})
    with pytest.raises(ConfigError, match=r"optim\.lr is None; expected float"):
        OptimConfig(lr=None)


def test_a_configuration_without_the_newer_keys_is_still_read() -> None:
    """Checkpoints keep their configuration: a key that came later takes its default, which changes nothing."""
    keys = ("channel_erase", "channel_write", "decay_lower_bound", "mimo_rank", "rope_fraction", "rope_scaling")
    values = to_dict(preset("gdn2-hybrid-tiny"))
    older = {k: v for k, v in values.items() if k not in (*keys, "rope_factor", "rope_length")}
    assert len(older) == len(values) - 8
    assert build(ModelConfig, older) == preset("gdn2-hybrid-tiny")
