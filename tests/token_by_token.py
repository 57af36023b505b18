"""Every token mixer as its own paper writes it, one token after the other: what the layers are held to.

Nothing here is shared with the layers, the operator or its reference: convolutions are sums over taps, rotations are
matrices or complex numbers, softmaxes run over the keys that a query sees. A function takes a layer, for its weights
and sizes, x [B, T, d_model] and the options, and returns y [B, T, d_model] and, by name, parts of the state after the
last token.
"""

import cmath
import math

import torch
from torch import Tensor

Result = tuple[Tensor, dict[str, Tensor]]


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def convolved(u: Tensor, weight: Tensor) -> Tensor:
    """u [B, T, D], weight [D, taps], the last tap on the token itself; then SiLU."""
    taps = weight.shape[1]
    padded = torch.cat([u.new_zeros(u.shape[0], taps - 1, u.shape[2]), u], dim=1)
    return silu(sum(padded[:, j : j + u.shape[1]] * weight[:, j] for j in range(taps)))


def low_rank(x: Tensor, pair) -> Tensor:
    y = x @ pair[0].weight.T @ pair[1].weight.T
    return y if pair[1].bias is None else y + pair[1].bias


def streams(layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, T, H, K] of length 1 and v [B, T, HV, V] of a delta mixer."""
    q, k, v = (
        convolved(x @ projection.weight.T, taps)
        for projection, taps in (
            (layer.q_proj, layer.conv_q), (layer.k_proj, layer.conv_k), (layer.v_proj, layer.conv_v),
        )
    )  # fmt: skip
    by_key = (layer.num_heads, layer.key_dim)
    return unit(q.unflatten(-1, by_key)), unit(k.unflatten(-1, by_key)), v.unflatten(-1, (-1, layer.value_dim))


def tails(layer, x: Tensor) -> dict[str, Tensor]:
    """The last inputs of a delta mixer's convolutions."""
    projections = {"conv_q": layer.q_proj, "conv_k": layer.k_proj, "conv_v": layer.v_proj}
    return {name: (x @ p.weight.T)[:, 1 - layer.conv_width :] for name, p in projections.items()}


def channel_decay(layer, x: Tensor, bound: float | None) -> Tensor:
    """alpha [B, T, H, K]: exp(-exp(a) softplus(.)), or exp(bound sigmoid(exp(a) .))."""
    decay = layer.gates.decay
    f = (low_rank(x, decay.projection) + decay.delta).unflatten(-1, (layer.num_heads, layer.key_dim))
    rate = torch.exp(decay.rate)[:, None]
    if bound is None:
        return torch.exp(-rate * softplus(f))
    return torch.exp(bound / (1 + torch.exp(-rate * f)))


def gated_delta_net_2(
    layer, x: Tensor, largest: float = 1, by_channel: tuple[bool, bool] = (True, True), bound: float | None = None
) -> Result:
    """S_t = (I - k (b * k)^T) Diag(alpha) S_{t-1} + k (w * v)^T (10), o = S^T q / sqrt(K)."""
    (q, k, v), alpha = streams(layer, x), channel_decay(layer, x, bound)
    H, HV, K, V = layer.num_heads, layer.num_value_heads, layer.key_dim, layer.value_dim
    b = torch.sigmoid(x @ layer.gates.erase.weight.T).unflatten(-1, (H, K)) * largest
    w = torch.sigmoid(x @ layer.gates.write.weight.T).unflatten(-1, (HV, V))
    if not by_channel[0]:
        b = b.mean(-1, keepdim=True).expand_as(b)
    if not by_channel[1]:
        w = w.mean(-1, keepdim=True).expand_as(w)
    S = [x.new_zeros(x.shape[0], K, V) for _ in range(HV)]
    outputs = []
    for t in range(x.shape[1]):
        for j in range(HV):
            h = j // (HV // H)
            k_t = k[:, t, h]
            transition = torch.eye(K, dtype=x.dtype) - outer(k_t, b[:, t, h] * k_t)
            S[j] = transition @ torch.diag_embed(alpha[:, t, h]) @ S[j] + outer(k_t, w[:, t, j] * v[:, t, j])
            outputs.append((S[j] * q[:, t, h, :, None]).sum(1) / K**0.5)
    o = torch.stack(outputs, dim=1).unflatten(1, (-1, HV))
    o = rms(o, layer.norm.weight) * silu(low_rank(x, layer.output_gate)).unflatten(-1, (HV, V))
    return o.flatten(-2) @ layer.out_proj.weight.T, {"memory": torch.stack(S, dim=1)} | tails(layer, x)


def kimi_delta_attention(layer, x: Tensor, bound: float | None = None) -> Result:
    """S_t = (I - beta k k^T) Diag(alpha) S_{t-1} + beta k v^T; a sigmoid gates the output."""
    (q, k, v), alpha = streams(layer, x), channel_decay(layer, x, bound)
    beta = torch.sigmoid(x @ layer.gates.beta.weight.T)
    S, outputs = x.new_zeros(x.shape[0], layer.num_heads, layer.key_dim, layer.value_dim), []
    for t in range(x.shape[1]):
        beta_t, k_t = beta[:, t, :, None, None], k[:, t]
        decayed = alpha[:, t, :, :, None] * S
        S = decayed - beta_t * outer(k_t, k_t) @ decayed + beta_t * outer(k_t, v[:, t])
        outputs.append((S * q[:, t, :, :, None]).sum(2) / layer.key_dim**0.5)
    o = rms(torch.stack(outputs, dim=1), layer.norm.weight)
    o = o.flatten(-2) * torch.sigmoid(low_rank(x, layer.output_gate))
    return o @ layer.out_proj.weight.T, {"memory": S} | tails(layer, x)


def gated_delta_net(layer, x: Tensor, largest: float = 1) -> Result:
    """S_t = alpha S_{t-1} (I - beta k k^T) + beta v k^T, in its paper's [V, K]; SiLU gates the output."""
    (q, k, v), decay = streams(layer, x), layer.gates.decay
    alpha = torch.exp(-torch.exp(decay.rate) * softplus(x @ decay.projection.weight.T + decay.delta))
    beta = torch.sigmoid(x @ layer.gates.beta.weight.T) * largest
    S, outputs = x.new_zeros(x.shape[0], layer.num_heads, layer.value_dim, layer.key_dim), []
    for t in range(x.shape[1]):
        beta_t, k_t = beta[:, t, :, None, None], k[:, t]
        transition = alpha[:, t, :, None, None] * (torch.eye(layer.key_dim, dtype=x.dtype) - beta_t * outer(k_t, k_t))
        S = S @ transition + beta_t * outer(v[:, t], k_t)
        outputs.append((S @ q[:, t, :, :, None]).squeeze(-1) / layer.key_dim**0.5)
    o = rms(torch.stack(outputs, dim=1), layer.norm.weight).flatten(-2) * silu(x @ layer.output_gate.weight.T)
    return o @ layer.out_proj.weight.T, {"memory": S.mT} | tails(layer, x)


def delta_net(layer, x: Tensor, largest: float = 1) -> Result:
    """S_t = S_{t-1} + beta (v - S_{t-1} k) k^T, in its paper's [V, K]; the output is normalised, not gated."""
    q, k, v = streams(layer, x)
    beta = torch.sigmoid(x @ layer.gates.beta.weight.T) * largest
    S, outputs = x.new_zeros(x.shape[0], layer.num_heads, layer.value_dim, layer.key_dim), []
    for t in range(x.shape[1]):
        error = v[:, t] - (S @ k[:, t, :, :, None]).squeeze(-1)
        S = S + outer(beta[:, t, :, None] * error, k[:, t])
        outputs.append((S @ q[:, t, :, :, None]).squeeze(-1) / layer.key_dim**0.5)
    o = rms(torch.stack(outputs, dim=1), layer.norm.weight)
    return o.flatten(-2) @ layer.out_proj.weight.T, {"memory": S.mT} | tails(layer, x)


def linear_attention(layer, x: Tensor) -> Result:
    """S_t = S_{t-1} + v k^T, in [V, K]; the output is normalised, not gated."""
    q, k, v = streams(layer, x)
    S, outputs = x.new_zeros(x.shape[0], layer.num_heads, layer.value_dim, layer.key_dim), []
    for t in range(x.shape[1]):
        S = S + outer(v[:, t], k[:, t])
        outputs.append((S @ q[:, t, :, :, None]).squeeze(-1) / layer.key_dim**0.5)
    o = rms(torch.stack(outputs, dim=1), layer.norm.weight)
    return o.flatten(-2) @ layer.out_proj.weight.T, {"memory": S.mT} | tails(layer, x)


def mamba2(layer, x: Tensor) -> Result:
    """h_t = exp(A dt) h_{t-1} + dt x B^T, y = h C + D x, in its paper's [V, K]; RMSNorm of y SiLU(z)."""
    H, K, V = layer.num_heads, layer.key_dim, layer.value_dim
    z, u, dt = (x @ layer.in_proj.weight.T).split([H * V, H * V + 2 * K, H], dim=-1)
    values, B, C = convolved(u, layer.conv).split([H * V, K, K], dim=-1)
    values, dt, A = values.unflatten(-1, (H, V)), softplus(dt + layer.delta), -torch.exp(layer.rate)
    h, outputs = x.new_zeros(x.shape[0], H, V, K), []
    for t in range(x.shape[1]):
        dt_t = dt[:, t, :, None]
        h = torch.exp(A[:, None] * dt_t)[..., None] * h + outer(dt_t * values[:, t], B[:, t, None])
        outputs.append((h * C[:, t, None, None]).sum(-1) + layer.skip[:, None] * values[:, t])
    o = rms(torch.stack(outputs, dim=1).flatten(-2) * silu(z), layer.norm.weight)
    return o @ layer.out_proj.weight.T, {"memory": h.mT, "conv": u[:, 1 - layer.conv_width :]}


def rotation(theta: Tensor, K: int) -> Tensor:
    """[..., pairs] -> [..., K, K]: block-diagonal rotations, the identity beyond the pairs."""
    matrix = torch.eye(K, dtype=theta.dtype).expand(*theta.shape[:-1], K, K).clone()
    for i in range(theta.shape[-1]):
        c, s = torch.cos(theta[..., i]), torch.sin(theta[..., i])
        block = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
        matrix[..., 2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
    return matrix


def mamba3(layer, x: Tensor) -> Result:
    """S_t = alpha S_{t-1} + eta sum_r k_{t-1} v_{t-1}^T + zeta sum_r k_t v_t^T, o_r = S_t^T q_{t,r}; R = 1 is SISO."""
    H, K, V, R, pairs = layer.num_heads, layer.key_dim, layer.value_dim, layer.rank, layer.pairs
    S, theta = x.new_zeros(x.shape[0], H, K, V), x.new_zeros(x.shape[0], H, pairs)
    before, outputs, keys, values = None, [], [], []
    for t in range(x.shape[1]):
        projected = x[:, t] @ layer.in_proj.weight.T
        z, u, b, c, dt, a, lam, phi = projected.split([H * V, H * V, R * K, R * K, H, H, H, pairs], dim=1)
        z, u = z.unflatten(-1, (H, V)), u.unflatten(-1, (H, V))
        dt, A, lam = softplus(dt + layer.delta), -softplus(a).clamp(min=1e-4), torch.sigmoid(lam)
        theta = theta + math.pi * torch.tanh(phi)[:, None] * dt[..., None]
        turn, alpha = rotation(theta, K), torch.exp(A * dt)
        S = alpha[..., None, None] * S
        if before is not None:
            S = S + ((1 - lam) * dt * alpha)[..., None, None] * before
        keys, queries = (
            [(turn @ (rms(p[:, r * K : (r + 1) * K], weight)[:, None] + bias[r])[..., None])[..., 0] for r in range(R)]
            for p, weight, bias in (
                (b, layer.key_norm.weight, layer.key_bias), (c, layer.query_norm.weight, layer.query_bias),
            )
        )  # fmt: skip
        values = [u * layer.mimo_value[r] if R > 1 else u for r in range(R)]
        before = sum(outer(k_r, v_r) for k_r, v_r in zip(keys, values))
        S = S + (lam * dt)[..., None, None] * before
        y = 0
        for r in range(R):
            o = (S * queries[r][..., None]).sum(2) + layer.skip[:, None] * values[r]
            o = o * silu(z * layer.mimo_gate[r] if R > 1 else z)
            y = y + (o * layer.mimo_out[r] if R > 1 else o)
        outputs.append(y.flatten(1) @ layer.out_proj.weight.T)
    last = {"key": torch.stack(keys, dim=1), "value": torch.stack(values, dim=1)}
    return torch.stack(outputs, dim=1), {"memory": S, "angles": theta.remainder(2 * math.pi)} | last


def turns_per_token(i: int, D: int, base: float, scaling: str, factor: float, length: int) -> float:
    """Radians by which pair i of D channels turns from one token to the next."""
    if scaling == "ntk":
        base = base * factor ** (D / (D - 2))
    omega = base ** (-2 * i / D)
    if scaling == "yarn":
        rotations = length * omega / (2 * math.pi)
        kept = min(1, max(0, (rotations - 1) / 31))
        omega = kept * omega + (1 - kept) * omega / factor
    return omega


def attention(
    layer, x: Tensor, window: int | None, base: float, scaling: str = "none", factor: float = 1, length: int = 0
) -> Result:
    """A softmax per query over the keys in its window, with rotary positions as complex numbers."""
    T, D = x.shape[1], layer.head_dim
    sharper = (1 + 0.1 * math.log(factor)) ** 2 if scaling == "yarn" else 1
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, D)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    turns = [
        [cmath.exp(1j * t * turns_per_token(i, D, base, scaling, factor, length)) for i in range(D // 2)]
        for t in range(T)
    ]
    q, k = (
        torch.complex(u[..., : D // 2], u[..., D // 2 :]) * torch.tensor(turns, dtype=torch.complex128)[:, None]
        for u in (q, k)
    )
    outputs = []
    for t in range(T):
        first = 0 if window is None else max(0, t - window + 1)
        scores = (q[:, t, None] * k[:, first : t + 1].conj()).real.sum(-1) * sharper / D**0.5
        outputs.append((torch.softmax(scores, dim=1)[..., None] * v[:, first : t + 1]).sum(1))
    return torch.stack(outputs, dim=1).flatten(-2) @ layer.out_proj.weight.T, {}
