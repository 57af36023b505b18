from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gdn2 import LanguageModel, ModelConfig
from gdn2.info import compare, describe

SMALL = ModelConfig(
    vocab_size=13, d_model=12, num_layers=4, mlp_width=20, cell=("mixer", "attention"), num_heads=2, num_value_heads=4,
    key_dim=3, value_dim=5, attention_heads=2, window=6,
)  # fmt: skip


def test_parameters_and_bytes_are_those_of_the_model() -> None:
    info, model = describe(SMALL), LanguageModel(SMALL)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.block_parameters == sum(p.numel() for p in model.blocks.parameters())
    assert info.embedding_parameters == 2 * 13 * 12
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert info.weight_bytes[name] == sum(p.nbytes for p in model.to(dtype).parameters())
    # bfloat16 halves everything but rate (2) and delta (2 * 3) of each of the two mixers, which stay float32.
    assert 2 * info.weight_bytes["bfloat16"] - info.weight_bytes["float32"] == 2 * (2 + 6) * 4


def test_tied_embeddings_are_counted_once() -> None:
    untied, tied = describe(SMALL), describe(replace(SMALL, tie_embeddings=True))
    assert untied.parameters - tied.parameters == tied.embedding_parameters == 13 * 12
    assert tied.forward_flops == untied.forward_flops


def test_state_is_what_the_model_carries() -> None:
    info, model = describe(SMALL), LanguageModel(SMALL)
    _, state = model(torch.zeros(1, 3, dtype=torch.int64))
    tensors = [t for layer in state for t in layer]
    assert info.state_floats == sum(t.numel() for t in tensors if t.is_floating_point())
    assert info.state_floats == 2 * (4 * 3 * 5 + 3 * (2 * 2 * 3 + 4 * 5)) + 2 * (2 * 6 * 12)
    assert info.state_bytes["float32"] == sum(t.nbytes for t in tensors)
    _, state = model.bfloat16()(torch.zeros(1, 3, dtype=torch.int64))
    assert info.state_bytes["bfloat16"] == sum(t.nbytes for layer in state for t in layer)


def test_published_memory_is_262144_floats_a_layer() -> None:
    config = ModelConfig()  # the defaults are gdn2-1.3b
    assert describe(config).state_floats == 18 * (262_144 + 3 * 3 * 2_048)  # memory (90) and tails


MIXERS = ("gdn2", "kda", "gdn", "deltanet", "linear", "mamba2", "mamba3")


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_counts_its_state_and_memory(mixer: str) -> None:
    config = replace(SMALL, mixer=mixer, num_value_heads=None, key_dim=4, mimo_rank=3 if mixer == "mamba3" else 1)
    info, model = describe(config), LanguageModel(config)
    _, state = model(torch.zeros(1, 3, dtype=torch.int64))
    assert info.state_floats == sum(t.numel() for layer in state for t in layer if t.is_floating_point())
    assert info.memory_floats == sum(layer.memory.numel() for layer in state[::2]) == 2 * (2 * 4 * 5)


def test_flops_of_the_other_mixers_by_hand() -> None:
    """Beyond gdn2's: no reading along e without erasing; R writes and reads, and the R x R correction."""
    small = replace(SMALL, num_layers=1, cell=("mixer",), num_value_heads=None, key_dim=4)

    def linear(config: ModelConfig) -> int:
        return 2 * sum(m.weight.numel() for m in LanguageModel(config).modules() if isinstance(m, torch.nn.Linear))

    mamba2, siso = replace(small, mixer="mamba2"), replace(small, mixer="mamba3")
    mimo = replace(siso, mimo_rank=3)
    assert describe(mamba2).forward_flops - linear(mamba2) == 2 * 4 * (2 * 5 + 2 * 4) + 2 * 5 * 4 * 5
    assert describe(siso).forward_flops - linear(siso) == 2 * (5 * 4 * 5 + 2 * (4 + 5))
    assert describe(mimo).forward_flops - linear(mimo) == 2 * (13 * 4 * 5 + 2 * 9 * (4 + 5))


def test_full_attention_state_grows_with_the_context() -> None:
    full = replace(SMALL, window=None)
    assert describe(full, 7).state_floats - describe(full, 5).state_floats == 2 * 2 * 2 * 12
    assert describe(full, 7).forward_flops > describe(full, 5).forward_flops


def test_flops_by_hand() -> None:
    info = describe(SMALL, context=10)
    mixer = 12 * 6 * 3 + 12 * 20 * 2 + 20 * 12  # q, k, erase; v, write; out
    mixer += 12 * 5 + 5 * 6 + 12 * 5 + 5 * 20  # decay and output gate, low rank
    attention = 4 * 12 * 12
    mlp = 3 * 12 * 20
    linear = 2 * (2 * mixer + 2 * attention + 4 * mlp + 13 * 12)
    convolution, operator = 2 * 4 * (6 + 6 + 20), 7 * 4 * 3 * 5
    keys = (1 + 2 + 3 + 4 + 5 + 6 * 5) / 10
    assert info.forward_flops == linear + 2 * (convolution + operator) + 2 * 4 * 12 * keys
    assert info.training_flops == 3 * info.forward_flops


def test_linear_flops_match_torch_own_count() -> None:
    """torch counts the matrix products it runs; the attention and the operator are left out on both sides."""
    config = replace(SMALL, cell=("mixer",))
    model, T = LanguageModel(config), 5
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(1, T, dtype=torch.int64))[0])
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    rest = 4 * (2 * 4 * (6 + 6 + 20) + 7 * 4 * 3 * 5)
    assert counted == T * (describe(config).forward_flops - rest)


def test_comparison_is_a_line_of_the_counts_for_each_model() -> None:
    models = {"window": SMALL, "full": replace(SMALL, window=None)}
    head, *lines = compare(models, context=10).splitlines()
    assert head.split()[-6:] == ["cache", "at", "4K", "cache", "at", "1M"]
    assert len({len(line) for line in (head, *lines)}) == 1  # columns under their heads
    for (name, config), line in zip(models.items(), lines, strict=True):
        info, caches = describe(config, 10), [describe(config, n).state_bytes["bfloat16"] for n in (2**12, 2**20)]
        expected = [info.block_parameters, info.parameters, info.memory_floats, info.state_floats]
        first, *numbers = line.replace(",", "").split()
        assert first == name
        assert [int(n) for n in numbers] == [*expected, round(info.forward_flops), *caches]
    # Keys and values of d_model bfloat16 numbers in each of two attention layers: only full attention's cache grows.
    assert [int(lines[1].replace(",", "").split()[i]) for i in (-1, -2)] == [
        caches[1], caches[1] - 2 * 2 * 12 * 2 * (2**20 - 2**12)
    ]  # fmt: skip
    assert lines[0].split()[-1] == lines[0].split()[-2]


def test_context_must_hold_a_token() -> None:
    with pytest.raises(ValueError, match="context is 0; expected at least 1 token"):
        describe(SMALL, context=0)
