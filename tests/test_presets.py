import pytest
import torch

from gdn2 import LanguageModel, preset
from gdn2.presets import preset_names

SIZES = {"1.3b": 1.3e9, "350m": 350e6, "150m": 150e6, "50m": 50e6, "10m": 10e6, "tiny": 1e6}


def on_meta(name: str) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(preset(name))


def test_every_size_has_a_recurrent_and_a_hybrid_model() -> None:
    assert set(preset_names()) == {f"{family}-{size}" for family in ("gdn2", "gdn2-hybrid") for size in SIZES}


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


@pytest.mark.parametrize("size", SIZES)
def test_recurrent_and_hybrid_are_of_the_size_they_are_called(size: str) -> None:
    recurrent, hybrid = (on_meta(f"{family}-{size}").num_block_parameters() for family in ("gdn2", "gdn2-hybrid"))
    # A name gives two digits; the MLP width, a multiple of 8 or more, moves a total by up to 1 %.
    assert abs(recurrent / SIZES[size] - 1) < 0.03
    assert abs(hybrid / recurrent - 1) < 0.01


@pytest.mark.parametrize("size", SIZES)
def test_hybrid_alternates_mixer_and_attention_with_matched_shapes(size: str) -> None:
    recurrent, hybrid = preset(f"gdn2-{size}"), preset(f"gdn2-hybrid-{size}")
    assert set(recurrent.layer_kinds) == {"mixer"}
    assert hybrid.layer_kinds == ("mixer", "attention") * (hybrid.num_layers // 2)
    assert (hybrid.d_model, hybrid.num_heads, hybrid.key_dim) == (
        recurrent.d_model,
        recurrent.num_heads,
        recurrent.key_dim,
    )
    assert hybrid.mlp_width > recurrent.mlp_width


def test_tiny_reads_bytes_through_a_short_window() -> None:
    for name in ("gdn2-tiny", "gdn2-hybrid-tiny"):
        assert preset(name).vocab_size == 257
        assert preset(name).window <= 128
    assert {preset(name).vocab_size for name in preset_names() if "tiny" not in name} == {32_000}


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"preset is 'gdn3'; expected one of gdn2-1\.3b, gdn2-hybrid-1\.3b, .*tiny"):
        preset("gdn3")
