"""Layers beside those of transformers, with the same weights; skipped where it is not installed.

    pip install transformers==5.17.0

Its torch paths compute the recurrences in float32 whatever they are given; kernel packages that it would prefer to them
are hidden while it is imported.
"""

import sys
import warnings

import pytest
import torch
from operands import relative
from torch import Tensor, nn

from gdn2.layers import GatedDeltaNet, KimiDeltaAttention, Mamba2
from gdn2.layers.attention import rotary_frequencies
from gdn2.ops import gated_delta_rule, mamba2

KERNELS = [name for name in ("fla", "mamba_ssm", "causal_conv1d") if name not in sys.modules]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own affair
    pytest.importorskip("transformers")
    sys.modules.update(dict.fromkeys(KERNELS))  # importing a None entry is an ImportError
    from transformers import KimiLinearConfig, LlamaConfig, Mamba2Config, Qwen3NextConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi
    from transformers.models.mamba2 import modeling_mamba2 as their_mamba2
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    for name in KERNELS:
        del sys.modules[name]

# Float32 on both sides, sums over up to 100 tokens in other orders. Measured: up to 1.2e-6.
BOUND = 1e-5
B, T, D_MODEL, H, K, V = 2, 100, 24, 3, 16, 8


def weighted(*tensors: Tensor) -> Tensor:
    """A scalar in which every number counts differently."""
    return sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in tensors)


def noisy(layer: nn.Module) -> nn.Module:
    """Weights so large that errors show; what decays start from stays."""
    for p in layer.parameters():
        if p.ndim > 1 or "norm" in type(layer).__name__.lower():
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return layer


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_gated_delta_rule_agrees_with_qwen3_next(form: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(B, T, H, K), nn.functional.normalize(torch.randn(B, T, H, K), dim=-1), torch.randn(B, T, H, V)
    leaves = [q, k, v, -torch.rand(B, T, H), torch.rand(B, T, H), torch.randn(B, H, K, V)]
    *tensors, start = (t.requires_grad_() for t in leaves)
    ours = gated_delta_rule(*tensors, initial_state=start, output_final_state=True)
    rule = getattr(qwen, f"torch_{form}_gated_delta_rule")
    theirs = rule(*tensors, initial_state=start, output_final_state=True)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < BOUND
    for a, b in zip(*(torch.autograd.grad(weighted(*r), [*tensors, start]) for r in (ours, theirs))):
        assert relative(a, b) < BOUND


def test_gated_delta_net_is_the_layer_of_qwen3_next_with_its_weights() -> None:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=D_MODEL, linear_num_key_heads=H, linear_num_value_heads=H, linear_key_head_dim=K,
        linear_value_head_dim=V, linear_conv_kernel_dim=4, rms_norm_eps=1e-5, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = qwen.Qwen3NextGatedDeltaNet(config, 0).eval()
    ours = noisy(GatedDeltaNet(D_MODEL, H, K, V))
    nn.init.normal_(ours.norm.weight)
    by_head = [
        p.weight.unflatten(0, (H, -1)) for p in (ours.q_proj, ours.k_proj, ours.v_proj, ours.output_gate)
    ]  # their projection goes head by head through q, k, v and z
    decay, beta = ours.gates.decay, ours.gates.beta
    theirs.load_state_dict(
        {
            "in_proj_qkvz.weight": torch.cat(by_head, dim=1).flatten(0, 1),
            "in_proj_ba.weight": torch.stack([beta.weight, decay.projection.weight], dim=1).flatten(0, 1),
            "conv1d.weight": torch.cat([ours.conv_q, ours.conv_k, ours.conv_v])[:, None],
            "A_log": decay.rate, "dt_bias": decay.delta, "norm.weight": ours.norm.weight,
            "out_proj.weight": ours.out_proj.weight,
        }
    )  # fmt: skip
    x = torch.randn(B, T, D_MODEL, requires_grad=True)
    y, other = ours(x)[0], theirs(x)
    assert relative(y, other) < BOUND
    pairs = [
        (ours.conv_v, lambda g: g[-1][2 * H * K :, 0]),
        (decay.rate, lambda g: g[1]),
        (decay.delta, lambda g: g[2]),
    ]
    mine = torch.autograd.grad(weighted(y), [x, *(p for p, _ in pairs)])
    its = torch.autograd.grad(weighted(other), [x, theirs.A_log, theirs.dt_bias, theirs.conv1d.weight])
    for a, b in zip(mine, [its[0], *(pick(its) for _, pick in pairs)], strict=True):
        assert relative(a, b) < BOUND


def test_kimi_delta_attention_is_the_layer_of_kimi_linear_with_its_weights() -> None:
    torch.manual_seed(0)
    config = KimiLinearConfig(
        hidden_size=D_MODEL, linear_num_heads=H, linear_head_dim=K, linear_conv_kernel_dim=4, rms_norm_eps=1e-5,
        num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = kimi.KimiLinearDeltaAttention(config, 0).eval()
    ours = noisy(KimiDeltaAttention(D_MODEL, H, K, K))  # the bias of its output gate, which theirs has not, starts at 0
    nn.init.normal_(ours.norm.weight)
    decay, gate = ours.gates.decay, ours.output_gate
    theirs.load_state_dict(
        {
            **{f"{name}_proj.weight": getattr(ours, f"{name}_proj").weight for name in "qkv"},
            "conv1d.weight": torch.cat([ours.conv_q, ours.conv_k, ours.conv_v])[:, None],
            "forget_gate.f_a_proj.weight": decay.projection[0].weight,
            "forget_gate.f_b_proj.weight": decay.projection[1].weight,
            "forget_gate.dt_bias": decay.delta, "forget_gate.A_log": decay.rate.view(1, 1, H, 1),
            "b_proj.weight": ours.gates.beta.weight, "g_a_proj.weight": gate[0].weight,
            "g_b_proj.weight": gate[1].weight, "o_norm.weight": ours.norm.weight, "o_proj.weight": ours.out_proj.weight,
        }
    )  # fmt: skip
    x = torch.randn(B, T, D_MODEL, requires_grad=True)
    y, other = ours(x)[0], theirs(x)
    assert relative(y, other) < BOUND
    mine = torch.autograd.grad(weighted(y), [x, decay.delta, ours.gates.beta.weight])
    leaves = [x, theirs.forget_gate.dt_bias, theirs.b_proj.weight]
    for a, b in zip(mine, torch.autograd.grad(weighted(other), leaves), strict=True):
        assert relative(a, b) < BOUND


def test_mamba2_is_the_layer_of_transformers_with_its_weights() -> None:
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=D_MODEL, num_heads=H, head_dim=V, expand=H * V // D_MODEL, state_size=K, n_groups=1, conv_kernel=4,
        use_conv_bias=False, layer_norm_epsilon=1e-5, num_hidden_layers=1, chunk_size=32,
    )  # fmt: skip
    theirs = their_mamba2.Mamba2Mixer(config, 0).eval()
    ours = noisy(Mamba2(D_MODEL, H, K, V))
    for p in (ours.norm.weight, ours.skip):
        nn.init.normal_(p)
    theirs.load_state_dict(
        {
            "in_proj.weight": ours.in_proj.weight, "conv1d.weight": ours.conv[:, None], "A_log": ours.rate,
            "dt_bias": ours.delta, "D": ours.skip, "norm.weight": ours.norm.weight,
            "out_proj.weight": ours.out_proj.weight,
        }
    )  # fmt: skip
    x = torch.randn(B, T, D_MODEL, requires_grad=True)
    y, other = ours(x)[0], theirs(x)
    assert relative(y, other) < BOUND
    mine = torch.autograd.grad(weighted(y), [x, ours.rate, ours.delta, ours.skip, ours.in_proj.weight])
    leaves = [x, theirs.A_log, theirs.dt_bias, theirs.D, theirs.in_proj.weight]
    for a, b in zip(mine, torch.autograd.grad(weighted(other), leaves), strict=True):
        assert relative(a, b) < BOUND


def test_mamba2_rule_agrees_with_the_scan_of_transformers() -> None:
    torch.manual_seed(0)
    C, B_, x, dt, A = (torch.randn(B, T, H, n) for n in (K, K, V, 1, 1))
    dt, A, start = dt.squeeze(-1).sigmoid(), -A[0, 0, :, 0].abs(), torch.randn(B, H, K, V)
    ours = mamba2(C, B_, x, A * dt, dt, initial_state=start, output_final_state=True)
    theirs = their_mamba2.mamba2_chunk_scan(
        x, dt, A, B_, C, chunk_size=32, initial_states=start.mT, return_final_states=True
    )
    assert relative(ours[0], theirs[0]) < BOUND
    assert relative(ours[1], theirs[1].mT) < BOUND  # their state is [V, K]


def test_yarn_agrees_outside_its_ramp_and_in_its_sharpening() -> None:
    """By design transformers mixes linearly in a pair's index, with ends at whole pairs; we, as the paper, in turns."""
    factor, length, D = 8.0, 4_096, 128
    config = LlamaConfig(
        hidden_size=D, num_attention_heads=1, max_position_embeddings=int(factor * length),
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": factor, "original_max_position_embeddings": length,
        },
    )  # fmt: skip
    theirs, sharper = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours, plain = (rotary_frequencies(D, 10_000.0, *extra) for extra in (("yarn", factor, length), ()))
    turns = length * plain / (2 * torch.pi)
    assert sharper == pytest.approx(1 + 0.1 * torch.tensor(factor).log().item())
    # One pair more on either side, for the rounding of the ends; the frequencies themselves in float32.
    for outside in (turns > 32 * 10_000 ** (2 / D), turns < 10_000 ** (-2 / D)):
        assert outside.any()
        torch.testing.assert_close(theirs[outside].double(), ours[outside], rtol=1e-6, atol=0)
    ratio = (theirs.double() / ours)[(turns < 32) & (turns > 1)]
    assert ratio.max() > 1.05  # what is by design does differ
