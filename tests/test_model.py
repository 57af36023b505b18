from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gdn2.model
from gdn2 import LanguageModel, ModelConfig
from gdn2.config import RunConfig, to_dict
from gdn2.layers import RMSNorm
from gdn2.model import find_checkpoint

SMALL = ModelConfig(
    vocab_size=29, d_model=16, num_layers=2, mlp_width=24, cell=("mixer", "attention"), num_heads=2, key_dim=4,
    value_dim=4, attention_heads=2, window=4,
)  # fmt: skip


def small(**changes: object) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(replace(SMALL, **changes))


def text(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(29, (batch, tokens + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:].clone()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_is_plain_cross_entropy_with_its_gradients(
    monkeypatch: pytest.MonkeyPatch, tied: bool, packed: bool, reduction: str
) -> None:
    monkeypatch.setattr(gdn2.model, "LOSS_CHUNK", 5)  # 20 tokens in four chunks
    model = small(tie_embeddings=tied).double()
    tokens, targets = text(1, 20) if packed else text(2, 10)
    targets[0, 3:6] = -100
    cu_seqlens = torch.tensor([0, 7, 7, 8, 20]) if packed else None
    logits = model.logits(model(tokens, cu_seqlens=cu_seqlens)[0])
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    chunked = model.loss(tokens, targets, cu_seqlens, reduction=reduction)
    if reduction == "none":
        plain = plain.view_as(targets)
        assert not chunked[0, 3:6].any()
    # Float64; the paths differ in how gradients of the head are summed over chunks.
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0, 1, plain.numel(), dtype=torch.float64).view_as(plain) + 1
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad((loss * weights).sum(), parameters) for loss in (chunked, plain))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_loss_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, Tensor):
                    self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
            return out

    monkeypatch.setattr(gdn2.model, "LOSS_CHUNK", 8)
    model = small(vocab_size=5_000)
    tokens, targets = text(1, 64)
    with Largest() as largest:
        model.loss(tokens, targets).backward()
    assert largest.numel <= 5_000 * 16  # the embedding itself; a chunk's logits are half of that, all of them 4 times


def test_loss_without_a_target_is_zero() -> None:
    model = small()
    tokens, targets = text(1, 6)
    loss = model.loss(tokens, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_first_loss_is_that_of_guessing() -> None:
    """The paper's initialisation makes first logits near 0: the loss is log(vocabulary) nats, to 1 %."""
    model = small(d_model=64, vocab_size=1_000)
    tokens, targets = text(2, 32)
    assert model.loss(tokens, targets).item() == pytest.approx(torch.tensor(1000.0).log().item(), rel=0.01)


MIXERS: dict[str, dict[str, object]] = {
    "gdn2": {},
    "kda": {"mixer": "kda"},
    "gdn": {"mixer": "gdn"},
    "deltanet": {"mixer": "deltanet"},
    "linear": {"mixer": "linear"},
    "mamba2": {"mixer": "mamba2"},
    "mamba3": {"mixer": "mamba3"},
    "mamba3-mimo": {"mixer": "mamba3", "mimo_rank": 4},
    "transformer": {"cell": ("attention",)},
    "ablated": {"channel_erase": False, "channel_write": False, "decay_lower_bound": -5.0},
}


@pytest.mark.parametrize("changes", MIXERS.values(), ids=MIXERS.keys())
def test_model_learns_a_sequence_by_heart(changes: dict[str, object]) -> None:
    model = small(**changes)
    tokens, targets = text(1, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(tokens, targets)
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # from 3.4 nats; measured 0.04


def test_model_starts_as_in_the_paper() -> None:
    model = small(d_model=64, mlp_width=256, num_heads=4, key_dim=16, value_dim=16, vocab_size=1_000)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fan = sum(module.weight.shape)
            assert module.weight.abs().max() <= 2**-2.5 * (6 / fan) ** 0.5
            # The smallest Linear has 1,024 uniform draws: their deviation is known to 1.4 %.
            assert module.weight.std().item() == pytest.approx(2**-2.5 * (2 / fan) ** 0.5, rel=0.06)
            assert module.bias is None or not module.bias.any()
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)  # 64,000 draws: known to 0.3 %
    assert torch.equal(model.norm.weight, torch.ones(64))


@pytest.mark.parametrize("tied", [False, True])
def test_building_on_meta_then_resetting_gives_a_whole_model(tied: bool) -> None:
    """Every parameter that the model has is reached: none keeps the filling."""
    with torch.device("meta"):
        model = LanguageModel(replace(SMALL, tie_embeddings=tied))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    torch.manual_seed(3)
    model.reset_parameters()
    assert all(p.isfinite().all() and p.device.type == "cpu" for p in model.parameters())
    again = small(tie_embeddings=tied)
    torch.manual_seed(3)
    again.reset_parameters()
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    tokens, targets = text(1, 5)
    model.loss(tokens, targets).backward()
    assert [n for n, p in model.named_parameters() if hasattr(p, "no_weight_decay")] == [
        "blocks.0.mixer.gates.decay.rate",
        "blocks.0.mixer.gates.decay.delta",
    ]


def test_tied_head_is_the_embedding() -> None:
    untied, tied = small(), small(tie_embeddings=True)
    assert untied.num_parameters() - tied.num_parameters() == 29 * 16
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embedding.weight.t())


def test_bfloat16_model_and_autocast() -> None:
    tokens, targets = text(2, 12)
    exact = small().loss(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        model = small()
        hidden, state = model(tokens, model.initial_state(2))
        assert model.logits(hidden).dtype == torch.float32
        cast = model.loss(tokens, targets)
    cast.backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    narrow = small().bfloat16()
    hidden, state = narrow(tokens)
    assert hidden.dtype == torch.bfloat16
    assert narrow.logits(hidden).dtype == state[0].memory.dtype == torch.float32
    loss = narrow.loss(tokens, targets)
    loss.backward()
    for value in (cast, loss):
        # Logits near 0.1 rounded to 8 bits move the loss of 3.4 nats by some 1e-3.
        assert value.item() == pytest.approx(exact.item(), abs=0.01)
    for name, p in narrow.named_parameters():
        kept = name.endswith(("decay.rate", "decay.delta"))
        assert p.dtype == p.grad.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_training_and_evaluation_modes_agree() -> None:
    model, (tokens, _) = small(), text(2, 9)
    assert torch.equal(model.train()(tokens)[0], model.eval()(tokens)[0])


def test_state_is_left_out_on_request() -> None:
    model, (tokens, _) = small(), text(2, 9)
    hidden, state = model(tokens, output_state=False)
    assert state is None
    assert torch.equal(hidden, model(tokens)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
def test_each_block_compiles_whole() -> None:
    model, (tokens, targets) = small(), text(2, 9)
    expected = model.loss(tokens, targets)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model.loss(tokens, targets), expected, rtol=1e-5, atol=0)  # float32, reordered
    torch._dynamo.reset()


def test_bad_arguments_are_named() -> None:
    model, (tokens, targets) = small(), text(2, 9)
    with pytest.raises(ValueError, match=r"tokens are torch.int64 of shape \[9\]; expected integers \[B, T\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"tokens are torch.float32 of shape \[2, 9\]"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"state has 1 entries; expected one per block \(2\)"):
        model(tokens, model.initial_state(2)[:1])
    with pytest.raises(ValueError, match="reduction is 'sum'; expected 'mean' or 'none'"):
        model.loss(tokens, targets, reduction="sum")
    with pytest.raises(ValueError, match=r"targets have shape \[2, 8\]; expected that of tokens \[2, 9\]"):
        model.loss(tokens, targets[:, 1:])


def save(model: LanguageModel, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(RunConfig(model=model.config))))
    return folder


@pytest.mark.parametrize("changes", [{"tie_embeddings": True}, *MIXERS.values()], ids=["tied", *MIXERS])
def test_checkpoint_comes_back_bit_for_bit(tmp_path: Path, changes: dict[str, object]) -> None:
    model = small(**changes)
    loaded = LanguageModel.from_checkpoint(save(model, tmp_path / "checkpoint"))
    assert loaded.config == model.config
    assert not loaded.training
    for (name, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad
        assert hasattr(a, "no_weight_decay") == hasattr(b, "no_weight_decay"), name


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_of_a_block_is_the_one_that_was_asked_for_with_its_options(name: str) -> None:
    mixer = small(**MIXERS[name], norm_eps=1e-3).blocks[0].mixer
    kinds = {"gdn2": "GatedDeltaNet2", "kda": "KimiDeltaAttention", "gdn": "GatedDeltaNet", "deltanet": "DeltaNet",
             "linear": "LinearAttention",
             "mamba2": "Mamba2", "mamba3": "Mamba3", "mamba3-mimo": "Mamba3", "ablated": "GatedDeltaNet2",
             "transformer": "SlidingWindowAttention"}  # fmt: skip
    assert type(mixer).__name__ == kinds[name]
    for norm in (m for m in mixer.modules() if isinstance(m, RMSNorm)):
        assert norm.eps == 1e-3
    if "mamba3" in name:
        assert mixer.rank == (4 if "mimo" in name else 1)
    if name == "ablated":
        gates = mixer.gates
        assert (gates.channel_erase, gates.channel_write, gates.decay.lower_bound) == (False, False, -5.0)


def test_options_reach_the_mixer_and_the_attention() -> None:
    kda = small(mixer="kda", negative_eigenvalues=True, decay_lower_bound=-2.0, conv_width=3).blocks[0].mixer
    assert (kda.gates.largest_erase, kda.gates.decay.lower_bound, kda.conv_width) == (2.0, -2.0, 3)
    assert small(mixer="mamba3", rope_fraction=1.0).blocks[0].mixer.pairs == 2
    attention = small(rope_base=7.0, rope_scaling="yarn", rope_factor=4.0, rope_length=99).blocks[1].mixer
    assert attention.rope == (7.0, "yarn", 4.0, 99)


def test_a_run_folder_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (900, 1_000, 12):
        save(small(), tmp_path / f"run/checkpoints/step_{step:08d}")
    save(small(), tmp_path / "run/checkpoints/step_00002000.partial")
    (tmp_path / "run/checkpoints/step_00003000").mkdir()  # nothing in it yet
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoints/step_00001000"
    assert LanguageModel.from_checkpoint(str(tmp_path / "run")).config == SMALL


def test_unusable_checkpoints_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' holds no checkpoint; expected a folder with model.safetensors"):
        LanguageModel.from_checkpoint(tmp_path / "nowhere")
    other = save(small(), tmp_path / "other")
    (other / "config.yaml").write_text(yaml.safe_dump(to_dict(RunConfig(model=replace(SMALL, mlp_width=32)))))
    with pytest.raises(ValueError, match=r"does not fit .*mlp.down.weight has shape \[16, 24\]; expected \[16, 32\]"):
        LanguageModel.from_checkpoint(other)
    missing = save(small(), tmp_path / "missing")
    weights = small().state_dict()
    del weights["norm.weight"]
    save_file(weights | {"extra": torch.zeros(1)}, missing / "model.safetensors")
    with pytest.raises(ValueError, match=r"extra has shape \[1\]; expected no such parameter"):
        LanguageModel.from_checkpoint(missing)
    save_file(weights, missing / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm.weight has shape missing; expected \[16\]"):
        LanguageModel.from_checkpoint(missing)
    (missing / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        LanguageModel.from_checkpoint(missing)
    (other / "config.yaml").write_text("model: [1")
    with pytest.raises(ValueError, match=r"config.yaml' is not YAML"):
        LanguageModel.from_checkpoint(other)
