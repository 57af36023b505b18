from pathlib import Path

import pytest
import torch

from gdn2 import LanguageModel, preset
from gdn2.info import compare, describe
from gdn2.presets import of_same_size, preset_names

SIZES = {"1.3b": 1.3e9, "350m": 350e6, "150m": 150e6, "50m": 50e6, "10m": 10e6, "tiny": 1e6}
MIXERS = ("gdn2", "kda", "gdn", "deltanet", "mamba2", "mamba3", "mamba3-mimo")
MEMORY = {"1.3b": 262_144, "350m": 131_072, "150m": 98_304, "50m": 65_536, "10m": 16_384, "tiny": 8_192}


def on_meta(name: str) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(preset(name))


def of_size(size: str) -> list[str]:
    return [name for name in preset_names() if name.endswith(f"-{size}")]


def test_every_mixer_has_a_recurrent_and_a_hybrid_model_of_every_size() -> None:
    families = {f"{mixer}{hybrid}" for mixer in MIXERS for hybrid in ("", "-hybrid")}
    families |= {"transformer", "transformer-full"}
    assert set(preset_names()) == {f"{family}-{size}" for family in families for size in SIZES}


@pytest.mark.parametrize(("name", "parameters"), [("gdn2-1.3b", 1_302_638_112), ("gdn2-hybrid-1.3b", 1_300_314_384)])
def test_published_models_have_exactly_the_published_parameters(name: str, parameters: int) -> None:
    model = on_meta(name)
    assert model.num_block_parameters() == parameters
    # Besides the blocks: an untied embedding and head of 32,000 words, and the final norm.
    assert model.num_parameters() == parameters + 2 * 32_000 * 2_304 + 2_304


def test_a_block_of_the_published_model_is_the_sum_of_its_parts() -> None:
    block = on_meta("gdn2-1.3b").blocks[0]
    linears = 6 * 2304 * 2048
    convolutions = 3 * 2048 * 4
    decay = 2304 * 128 + 128 * 2048 + 16 + 2048
    output_gate = 2304 * 128 + 128 * 2048 + 2048
    norms = 128 + 2 * 2304
    mlp = 3 * 2304 * 6208
    assert sum(p.numel() for p in block.parameters()) == linears + convolutions + decay + output_gate + norms + mlp


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # q, k, v, o; beta; taps; decay of low rank, rate and delta; output gate of low rank with biases; output norm
        ("kda", 4 * 2304 * 2048 + 2304 * 16 + 3 * 2048 * 4 + 2 * (2304 * 128 + 128 * 2048) + 16 + 2 * 2048 + 128),
        # q, k, v, o, output gate; beta and decay; taps; rate and delta; output norm
        ("gdn", 5 * 2304 * 2048 + 2 * 2304 * 16 + 3 * 2048 * 4 + 2 * 16 + 128),
        ("deltanet", 4 * 2304 * 2048 + 2304 * 16 + 3 * 2048 * 4 + 128),
        # z, x and out; B and C; dt; taps; rate, delta, skip; output norm
        ("mamba2", 3 * 2304 * 4096 + 2304 * (2 * 64 + 64) + (4096 + 2 * 64) * 4 + 3 * 64 + 4096),
        # z, x and out; B and C; dt, A and lambda; angles; norms and biases of B and C; delta, skip
        ("mamba3", 3 * 2304 * 4096 + 2304 * (2 * 64 + 3 * 64 + 16) + 2 * (64 + 64 * 64) + 2 * 64),
        ("mamba3-mimo", 3 * 2304 * 4096 + 2304 * (8 * 64 + 3 * 64 + 16) + 2 * (64 + 4 * 64 * 64) + 2 * 64 + 12 * 4096),
        ("transformer", 4 * 2304 * 2304),
    ],
)
def test_a_mixer_of_the_1_3b_models_is_the_sum_of_its_parts(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in on_meta(f"{name}-1.3b").blocks[0].mixer.parameters()) == parameters


@pytest.mark.parametrize("size", SIZES)
def test_models_of_a_size_have_matched_parameters_and_memories(size: str) -> None:
    models = {name: describe(preset(name)) for name in of_size(size)}
    reference = 1.3e9 if size == "1.3b" else models[f"gdn2-{size}"].block_parameters
    assert abs(reference / SIZES[size] - 1) < 0.03  # a name gives two digits
    for name, model in models.items():
        config = preset(name)
        assert abs(model.block_parameters / reference - 1) < 0.005, name
        assert model.memory_floats == config.layer_kinds.count("mixer") * MEMORY[size], name


@pytest.mark.parametrize("size", SIZES)
def test_no_other_mlp_width_of_the_same_step_comes_closer(size: str) -> None:
    """The widths are solved, not chosen: one step up or down is farther from the size's parameters."""
    step = {"1.3b": 32, "350m": 16, "150m": 16, "50m": 8, "10m": 8, "tiny": 4}[size]
    reference = 1.3e9 if size == "1.3b" else describe(preset(f"gdn2-{size}")).block_parameters
    for name in of_size(size):
        if name == "gdn2-1.3b":  # published
            continue
        config = preset(name)
        assert config.mlp_width % step == 0, name
        # A channel of the MLP has three weights of d_model; half a step is the farthest that the closest width can be.
        half = 3 * config.d_model * config.num_layers * step / 2
        assert abs(describe(config).block_parameters - reference) <= half, name


@pytest.mark.parametrize("size", SIZES)
def test_models_of_a_size_share_everything_but_the_mixer(size: str) -> None:
    gdn2 = preset(f"gdn2-{size}")
    for name in of_size(size):
        config = preset(name)
        for key in ("d_model", "num_layers", "vocab_size", "attention_heads", "rope_base", "norm_eps"):
            assert getattr(config, key) == getattr(gdn2, key), name
        assert config.window == (None if "full" in name else gdn2.window), name
        expected = ("attention",) if "transformer" in name else ("mixer", "attention") if "hybrid" in name else None
        assert config.cell == (expected or ("mixer",))
        assert expected is None or config.num_layers % len(expected) == 0


def test_names_say_the_mixer() -> None:
    for mixer in MIXERS:
        for hybrid in ("", "-hybrid"):
            config = preset(f"{mixer}{hybrid}-tiny")
            assert config.mixer == mixer.removesuffix("-mimo")
            assert config.mimo_rank == (4 if mixer == "mamba3-mimo" else 1)


def test_tiny_reads_bytes_through_a_short_window() -> None:
    for name in of_size("tiny"):
        assert preset(name).vocab_size == 257
        assert "full" in name or preset(name).window <= 128
    assert {preset(name).vocab_size for name in preset_names() if "tiny" not in name} == {32_000}


def test_the_documented_comparison_is_the_current_one() -> None:
    documented = (Path(__file__).parents[1] / "docs" / "baselines.md").read_text(encoding="utf-8").splitlines()
    for line in compare(of_same_size("gdn2-1.3b")).splitlines():
        assert line in documented


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"'gdn2-1b'; expected KIND-SIZE, such as gdn2-1\.3b, .* with KIND .* SIZE .* tiny"
    ):
        preset("gdn2-1b")
    with pytest.raises(ValueError, match=r"'gpt'; expected KIND-SIZE, with KIND one of gdn2, gdn2-hybrid, kda"):
        preset("gpt")
