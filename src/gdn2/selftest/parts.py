"""Layers, and what else a model is made of, on a device beside the same in float64 on the CPU."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn2.config import ModelConfig
from gdn2.decoding import DecodeStep, likeliest_tokens
from gdn2.layers import GatedDeltaNet2, RMSNorm, SlidingWindowAttention, SwiGLU
from gdn2.layers.linear import Linear
from gdn2.layers.quantized import QuantizedLinear
from gdn2.model import LanguageModel
from gdn2.ops.cross_entropy import cross_entropy
from gdn2.selftest.compare import relative, with_gradients, worst

CPU = torch.device("cpu")


def _layers(device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A layer on the device, and a copy in float64 on the CPU."""
    torch.manual_seed(0)
    layer = GatedDeltaNet2(64, 2, 2, 128, 128).to(device)
    exact = GatedDeltaNet2(64, 2, 2, 128, 128).double()
    exact.load_state_dict(layer.state_dict())
    return layer, exact


def layer_errors(dtype: torch.dtype, device: torch.device) -> tuple[float, float, str]:
    """The worst errors of a training pass under autocast to `dtype`: of outputs, of gradients, and that one's name."""
    errors: dict[str, float] = {}

    def hold(name: str, call: Callable[[Any, Tensor], Tensor], narrow: Any, exact: Any, width: int = 64) -> None:
        """A part's results and gradients on the device, beside those in float64."""
        drawn, results = torch.randn(2, 150, width), []
        for part, where, kind in ((narrow, device, torch.float32), (exact, CPU, torch.float64)):
            x = drawn.to(where, kind).requires_grad_()
            with torch.autocast(where.type, dtype, enabled=kind is not torch.float64 and dtype != torch.float32):
                y = call(part, x)
            results.append(with_gradients({"y": y}, {"x": x} | dict(part.named_parameters())))
        for n, x in results[0].items():
            found = f"d {name}, {n.removeprefix('d ')}" if n.startswith("d ") else f"{name}, {n}"
            errors[found] = relative(x, results[1][n])

    def both(part: Any) -> tuple[Any, Any]:
        return copy.deepcopy(part).to(device), part.double()

    def in_pieces(bounds: list[int] | None) -> Callable[[Any, Tensor], Tensor]:
        """A layer that goes on from the state of the piece before, packed or not."""

        def call(layer: Any, x: Tensor) -> Tensor:
            state, outputs = None, []
            cu_seqlens = None if bounds is None else torch.tensor(bounds, device=x.device)
            for piece in (x[:, :2], x[:, 2:]) if bounds is None else (x[:1], x[1:]):
                y, state = layer(piece, state, cu_seqlens=cu_seqlens)
                outputs.append(y)
            return torch.cat(outputs, dim=1)

        return call

    hold("layer", lambda layer, x: layer(x)[0], *_layers(device))
    hold("layer in pieces", in_pieces(None), *_layers(device))
    hold("packed layer in pieces", in_pieces([0, 2, 2, 100, 150]), *_layers(device))
    hold("sum and norm", lambda norm, x: torch.cat(norm.of_sum(x, x.square()), dim=-1), *both(RMSNorm(64)))
    hold("SwiGLU", lambda mlp, x: mlp(x), *both(SwiGLU(64, 300)))
    for window in (20, 100):
        attention = both(SlidingWindowAttention(128, 2, window=window))
        hold(f"window of {window}", lambda part, x: part(x, output_state=False)[0], *attention, width=128)
    words = torch.randint(300, (2 * 150,))
    words[::7] = -1
    loss = lambda head, x: cross_entropy(head(3 * x).flatten(0, 1), words.to(x.device), -1)  # noqa: E731
    hold("loss", loss, *both(Linear(64, 300, bias=False)))
    return worst(errors)


@torch.no_grad()
def step_errors(dtype: torch.dtype, device: torch.device) -> tuple[float, float, str]:
    """The worst error of decoding steps, of layers and of a model, in `dtype`."""
    layer, exact = _layers(device)
    errors = {}
    state = wide = None
    for step, x in enumerate(torch.randn(4, 3, 1, 64)):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y, state = layer(x.to(device), state)
        z, wide = exact(x.double(), wide)
        errors[f"y {step}"] = relative(y, z)
    return worst(errors | _in_place_errors(dtype, device))


def _in_place_errors(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of what a model's decoding step consists of, each part with weights of `dtype` beside the same in float64."""

    def both(part: Any) -> tuple[Any, Any]:
        return part.to(device, dtype), copy.deepcopy(part).to(CPU).double()

    def held(name: str, call: Callable[[Any, Tensor], Tensor], part: Any, x: Tensor) -> None:
        narrow, exact = both(part)
        if hasattr(narrow, "pack"):
            narrow.pack()
        errors[name] = relative(call(narrow, x.to(device, dtype)), call(exact, x.to(dtype).double()))

    errors: dict[str, float] = {}
    torch.manual_seed(0)
    for name, part in (
        ("step", GatedDeltaNet2(64, 2, 2, 128, 128)),
        ("attention", SlidingWindowAttention(256, 2, window=80)),
    ):
        narrow, exact = both(part)
        if isinstance(narrow, GatedDeltaNet2):
            narrow.pack()
        drawn = exact.initial_state(3)
        drawn = type(drawn)(*(torch.randn_like(t) if t.is_floating_point() else t + 100 for t in drawn))
        own = type(drawn)(*(t.to(like) for t, like in zip(drawn, narrow.initial_state(3))))
        wide = type(drawn)(*(t.to(like, copy=True) for t, like in zip(own, exact.initial_state(3))))
        for n, x in enumerate(torch.randn(4, 3, 1, part.d_model)):
            y, z = narrow.step(x.to(device, dtype), own), exact.step(x.to(dtype).double(), wide)
            errors[f"{name} {n}"] = relative(y, z)
    errors |= _few_errors(dtype, device)
    x = torch.randn(3, 1, 256)
    held("sum and norm", lambda part, x: torch.cat(part.of_sum(x, 2 * x)), RMSNorm(256), x)
    held("SwiGLU", lambda part, x: part.step(x), SwiGLU(256, 300), x)
    for kind in ("int8", "fp8"):
        held(kind, lambda part, x: part(x), QuantizedLinear(Linear(256, 70, bias=False), kind), x)
    return errors


def _few_errors(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of the layers as they decode few texts, by other kernels, with the norm before and the residual sum after."""

    def summed(part: Any, x: Tensor, norm: RMSNorm, *state: Any) -> Tensor:
        y: Tensor = part.step_sum(x, norm, *state) if part.few(x, *state) else x + part.step(norm(x), *state)
        return y

    errors: dict[str, float] = {}
    part: Any
    for name, part in (
        ("mixer", GatedDeltaNet2(64, 1)),
        ("attention", SlidingWindowAttention(64, 2, window=3)),
        ("SwiGLU", SwiGLU(64, 100)),
    ):
        norm, (narrow, exact) = RMSNorm(64), (copy.deepcopy(part).to(device, dtype), part.to(dtype).to(CPU).double())
        narrow.pack()
        for rows in (1, 2, 3):
            states = [()] * 2 if name == "SwiGLU" else [(layer.initial_state(rows),) for layer in (narrow, exact)]
            for n, x in enumerate(torch.randn(4, rows, 1, 64).mul(0.01).to(dtype)):  # the sum does not hide the rest
                y = summed(narrow, x.to(device), copy.deepcopy(norm).to(device, dtype), *states[0])
                errors[f"{rows} of {name} {n}"] = relative(y, summed(exact, x.double(), norm.double(), *states[1]))
    return errors | _head_errors(dtype, device)


def _head_errors(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of a model whose rows of weights are wide, with logits in float32 and an odd vocabulary; and of the choice
    of the likeliest token, also where a logit is NaN and where two are equal."""
    config = ModelConfig(vocab_size=8_200, d_model=1_700, num_layers=1, mlp_width=3_000, num_heads=1)
    narrow = LanguageModel(config).to(dtype)
    exact = copy.deepcopy(narrow).double().eval()
    narrow = narrow.to(device).eval()
    narrow.pack()
    errors = {}
    for rows in (1, 2, 3):
        step, wide = DecodeStep(narrow, rows, graph=False), DecodeStep(exact, rows, graph=False)
        for n, tokens in enumerate(torch.randint(config.vocab_size, (2, rows)).tolist()):
            errors[f"logits {n} of {rows}"] = relative(step(tokens), wide(tokens))
            errors[f"likeliest {n} of {rows}"] = _others(step.likeliest, step.logits.argmax(-1))
    logits = torch.randn(3, 20_000, device=device)
    logits[0, [19_000, 300]], logits[1, 12_345] = 9.0, float("nan")
    errors["likeliest"] = _others(
        likeliest_tokens(logits), torch.stack([logits.new_tensor(x) for x in (300, -1, int(logits[2].argmax()))])
    )
    return errors


def _others(a: Tensor, b: Tensor) -> float:
    """0, or inf where one integer is another than it should be."""
    return 0.0 if a.tolist() == b.tolist() else float("inf")
