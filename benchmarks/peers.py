"""Operands, and the operators that are timed on them: ours, and flash-linear-attention's on request."""

import torch
import torch.nn.functional as F

from gdn2.ops import gated_delta_rule_2, kda
from gdn2.ops.kernels import launch

NAMES = ("q", "k", "v", "log_decay", "erase", "write")
TIED_NAMES = ("q", "k", "v", "log_decay", "beta")


def operands(B, T, H, D, decay="layer", keys="random", seed=0, dtype=torch.bfloat16, tied=False):
    """The operands; decays as the layer's initialisation draws them, or constant, or a mixture of extremes.

    `tied`: one beta per head and token [B, T, H] in the place of erase and write.
    """
    torch.manual_seed(seed)
    normal = lambda: torch.randn(B, T, H, D, device="cuda")  # noqa: E731
    q, k, v = F.normalize(normal(), dim=-1), F.normalize(normal(), dim=-1), normal() / 2
    if keys == "identical":
        k = k[:, :1].expand_as(k).contiguous()
    gates = [torch.rand(B, T, H, device="cuda")] if tied else [torch.rand(B, T, H, D, device="cuda") for _ in range(2)]
    rate = torch.empty(H, 1, device="cuda").uniform_(1, 16)
    dt = torch.empty(H, D, device="cuda").uniform_(-6.9, -2.3).exp()
    log_decay = -rate * F.softplus(0.3 * normal() + torch.log(torch.expm1(dt)))
    if decay in ("none", "-90"):
        log_decay = torch.full_like(log_decay, 0.0 if decay == "none" else -90.0)
    elif decay == "mixed":
        log_decay = torch.where(torch.rand_like(log_decay) < 0.1, 1e3 * log_decay, 0.1 * log_decay)
    return [*(x.to(dtype) for x in (q, k, v)), log_decay, *(x.to(dtype) for x in gates)]


class Peer:
    """`rule(*operands, cu_seqlens)` -> o; `step(*operands, state)` is one token."""

    def __init__(self, label, rule, tied=False):
        self.label, self.rule, self.tied = label, rule, tied

    @torch.no_grad()
    def forward(self, tensors, cu_seqlens=None):
        return self.rule(*tensors, cu_seqlens)

    def both(self, tensors, do, cu_seqlens=None):
        leaves = [x.detach().requires_grad_() for x in tensors]
        o = self.rule(*leaves, cu_seqlens)
        return o.detach(), torch.autograd.grad(o, leaves, do)


def ours():
    def rule(*tensors_and_bounds):
        *tensors, cu_seqlens = tensors_and_bounds
        return gated_delta_rule_2(*tensors, cu_seqlens=cu_seqlens, backend="triton")[0]

    return Peer("gdn2", rule)


def ours_tied():
    def rule(*tensors_and_bounds):
        *tensors, cu_seqlens = tensors_and_bounds
        return kda(*tensors, cu_seqlens=cu_seqlens, backend="triton")[0]

    return Peer("gdn2, tied gates", rule, tied=True)


def fla():
    from fla.ops.gdn2 import chunk_gdn2

    return Peer("fla 0.6.0 chunk_gdn2", lambda *x: chunk_gdn2(*x[:-1], cu_seqlens=x[-1])[0])


def fla_tied():
    from fla.ops.kda import chunk_kda

    return Peer("fla 0.6.0 chunk_kda", lambda *x: chunk_kda(*x[:-1], cu_seqlens=x[-1])[0], tied=True)


def our_step(tensors, state):
    launch.step(*(x[:, 0] for x in tensors), state.shape[-2] ** -0.5, state)


def fla_step(tensors, state):
    from fla.ops.gdn2 import fused_recurrent_gdn2

    with torch.no_grad():
        fused_recurrent_gdn2(*tensors, initial_state=state, output_final_state=True)
