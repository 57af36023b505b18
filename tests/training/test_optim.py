import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from gdn2.config import ConfigError, OptimConfig
from gdn2.model import LanguageModel
from gdn2.presets import preset
from gdn2.training.muon import block_matrices
from gdn2.training.optim import adamw, build_optimizer, groups, learning_rate
from gdn2.training.sharding import scale_down

WARMUP, TOTAL = 100, 1000


def rate(schedule: str, tokens: int, **more: float) -> float:
    config = OptimConfig(lr=2.0, min_lr_ratio=0.1, schedule=schedule, warmup_tokens=WARMUP, **more)  # type: ignore[arg-type]
    return learning_rate(config, tokens, TOTAL)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_is_linear_and_never_zero(schedule: str) -> None:
    assert rate(schedule, 1) == pytest.approx(0.02)
    assert rate(schedule, 50) == pytest.approx(1.0)
    assert rate(schedule, WARMUP) == 2.0


def test_cosine_passes_its_middle_and_ends_at_the_minimum() -> None:
    assert rate("cosine", (WARMUP + TOTAL) // 2) == pytest.approx(2 * 0.55)  # the mean of 1 and 0.1
    assert rate("cosine", TOTAL) == pytest.approx(0.2)
    values = [rate("cosine", t) for t in range(WARMUP, TOTAL + 1)]
    assert values == sorted(values, reverse=True)


def test_wsd_stays_and_then_falls_linearly() -> None:
    assert rate("wsd", 800, decay_tokens=200) == 2.0
    assert rate("wsd", 900, decay_tokens=200) == pytest.approx(2 * 0.55)
    assert rate("wsd", TOTAL, decay_tokens=200) == pytest.approx(0.2)
    assert rate("wsd", TOTAL) == 2.0  # without a decay


def test_constant_stays() -> None:
    assert rate("constant", TOTAL) == 2.0


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(OptimConfig(lr=2.0, schedule="constant"), 1, TOTAL) == 2.0
    assert learning_rate(OptimConfig(lr=2.0, min_lr_ratio=0.0), TOTAL, TOTAL) == pytest.approx(0, abs=1e-15)


def test_only_matrices_decay() -> None:
    with torch.device("meta"):
        model = LanguageModel(preset("gdn2-hybrid-tiny"))
    optimizer = adamw(model.to_empty(device="cpu"), OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or getattr(parameter, "no_weight_decay", False)
        assert decay[id(parameter)] == (0.0 if exempt else 0.3), name
    assert set(decay.values()) == {0.0, 0.3}
    assert len(decay) == len(list(model.parameters()))


def test_marked_matrix_is_exempt() -> None:
    model = nn.Linear(3, 3)
    model.weight.no_weight_decay = True  # type: ignore[assignment]
    assert adamw(model, OptimConfig()).param_groups[0]["params"] == []


def test_decay_shrinks_matrices_alone() -> None:
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw(model, OptimConfig(lr=0.1, weight_decay=0.5)).step()
    torch.testing.assert_close(model.weight, before[0] * (1 - 0.1 * 0.5), rtol=2 * math.ulp(1) * 2**29, atol=0)
    assert torch.equal(model.bias, before[1])


def small_model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(replace(preset("gdn2-hybrid-tiny"), num_layers=2, d_model=16, mlp_width=24, key_dim=8))


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(name="muon", weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    muon, decay, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert muon | decay | plain == set(names.values())
    assert "blocks.0.mixer.q_proj.weight" in muon
    assert "blocks.1.mlp.down.weight" in muon
    assert decay == {"embedding.weight", "head.weight", *(f"blocks.0.mixer.conv_{x}" for x in "qkv")}
    assert "blocks.0.mixer.gates.decay.rate" in plain
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]


def test_muon_step_is_torchs_own_and_adamw_the_rest_through_a_saved_state() -> None:
    """Against the two optimizers run side by side, the second half after a round trip of the state."""
    config = OptimConfig(name="muon", lr=1e-2)
    one, two = small_model(), small_model()
    ours = build_optimizer(one, config)
    matrices = block_matrices(two)
    rest = groups([p for p in two.parameters() if all(p is not m for m in matrices)], config)
    pair = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-2, betas=config.betas, eps=config.eps, fused=True),
    ]
    tokens = torch.randint(0, 257, (2, 20))
    for step in range(4):
        for model, optimizers in ((one, [ours]), (two, pair)):
            model.loss(tokens, tokens).backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-2 / (step + 1)
                optimizer.step()
                optimizer.zero_grad()
        if step == 1:
            state = ours.state_dict()
            ours = build_optimizer(one, config)
            ours.load_state_dict(state)
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        assert torch.equal(p, q), name
    assert not torch.equal(one.embedding.weight, small_model().embedding.weight)
    assert set(ours.state[block_matrices(one)[0]]) == {"momentum_buffer"}


def test_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.name is 'sgd'; expected one of adamw, muon"):
        OptimConfig(name="sgd")
    with pytest.raises(ConfigError, match=r"optim\.momentum is 1\.0"):
        OptimConfig(momentum=1.0)


@pytest.mark.parametrize(("largest", "kept"), [(1e3, True), (0.25, False)])
def test_gradients_are_scaled_only_when_they_are_too_large(largest: float, kept: bool) -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    before = [g.clone() for g in gradients]
    assert scale_down(gradients, 5.0, largest) == 5.0
    assert all(map(torch.equal, gradients, before)) == kept
    norm = float(torch.nn.utils.get_total_norm(gradients))
    assert norm == pytest.approx(5.0 if kept else largest, rel=1e-6)
