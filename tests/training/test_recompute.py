from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gdn2 import LanguageModel, ModelConfig
from gdn2.config import ConfigError, RunConfig
from gdn2.ops import fused
from gdn2.training import train
from gdn2.training.memory import Live
from gdn2.training.recompute import recompute

MakeConfig = Callable[..., RunConfig]
SIZES = {
    "vocab_size": 31, "d_model": 32, "mlp_width": 48, "num_layers": 3, "num_heads": 2, "key_dim": 8, "value_dim": 8,
    "attention_heads": 2, "cell": ("mixer", "attention"), "window": 16,
}  # fmt: skip
MODES = ("none", "selective", "full")


def step(mode: str, cu_seqlens: torch.Tensor | None = None, bf16: bool = False, **changes: Any) -> tuple[Any, ...]:
    """Loss, gradients by name and bytes alive before the backward pass."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SIZES | changes))
    recompute(model, mode)
    tokens = torch.randint(0, 31, (1, 140))
    with Live(list(model.parameters())) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(tokens, tokens, cu_seqlens)
        held = live.now
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, held


@pytest.mark.parametrize("mixer", ["gdn2", "kda", "mamba2", "mamba3"])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_those_without_and_less_is_held(mixer: str, bf16: bool) -> None:
    """Bit for bit: the same operations run on the same values."""
    steps = {mode: step(mode, mixer=mixer, bf16=bf16) for mode in MODES}
    loss, gradients, held = steps["none"]
    for mode in MODES[1:]:
        assert torch.equal(steps[mode][0], loss)
        assert steps[mode][1].keys() == gradients.keys()
        assert all(torch.equal(steps[mode][1][name], g) for name, g in gradients.items())
    assert held > 1.5 * steps["selective"][2] > 2 * steps["full"][2]


def test_packed_sequences_and_a_pass_without_gradients() -> None:
    cu_seqlens = torch.tensor([0, 33, 34, 140])
    (loss, gradients, _), (again, others, _) = step("none", cu_seqlens), step("full", cu_seqlens)
    assert torch.equal(loss, again)
    assert all(torch.equal(others[name], g) for name, g in gradients.items())
    model = LanguageModel(ModelConfig(**SIZES))
    x = torch.zeros(1, 5, dtype=torch.int64)
    with torch.no_grad():
        hidden, state = model(x)
        recompute(model, "selective")
        again, after = model(x)
    assert torch.equal(hidden, again)
    assert all(torch.equal(a, b) for s, t in zip(state, after) for a, b in zip(s, t))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
@pytest.mark.parametrize("mode", MODES[1:])
def test_compiled_blocks_agree(mode: str) -> None:
    """Traced by dynamo and differentiated ahead of time; what inductor adds is its own code for the same graph."""
    torch.manual_seed(0)
    plain = LanguageModel(ModelConfig(**SIZES | {"num_layers": 1}))
    compiled = LanguageModel(plain.config)
    compiled.load_state_dict(plain.state_dict())
    recompute(compiled, mode)
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    tokens = torch.randint(0, 31, (2, 70))
    for model in (plain, compiled):
        model.loss(tokens, tokens).backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters()):
        # another order of float32 sums in decomposed backwards
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6 * float(p.grad.abs().max()), msg=name)


def test_runs_with_and_without_are_the_same_run(make_config: MakeConfig, tmp_path: Path) -> None:
    last = []
    for mode in MODES:
        outcome = train(make_config(f"train.recompute={mode}", "train.tokens=512"), tmp_path / mode)
        assert outcome.val is not None
        last.append(outcome.val["loss"])
    assert last[0] == last[1] == last[2]


def test_unknown_mode_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.recompute is 'all'; expected one of none, selective, full"):
        make_config("train.recompute=all")


@pytest.mark.parametrize("mode", MODES[1:])
def test_fused_kernels_run_again(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their backward passes ask for what was saved once, as recomputation allows. Interpreted where there is no GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(fused, "DEVICES", ("cuda", "cpu"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gradients = []
    for use in ("none", mode):
        torch.manual_seed(0)
        model = LanguageModel(ModelConfig(**SIZES | {"num_layers": 1, "d_model": 16, "mlp_width": 16})).to(device)
        recompute(model, use)
        tokens = torch.randint(0, 31, (1, 6)).to(device)
        with np.errstate(all="ignore"):  # strong chunks overflow in the launch for ordinary ones, as on a GPU
            model.loss(tokens, tokens).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        # on a GPU sums over rows may come in another order
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
