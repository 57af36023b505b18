"""What 8-bit weights and bfloat16 memories cost in accuracy.

    python benchmarks/narrow_numbers.py RUN            # a trained run's folder, such as that of make demo
    python benchmarks/narrow_numbers.py                # the recurrence alone

Prints a row for each measurement, on a CPU in float32:

- memory error: the recurrence (9) token by token on random keys, values and gates, with decays as a layer starts with;
  its output and state against float64's, relative L2, where the state is rounded to float32 or to bfloat16 after each
  token.
- weights: nats a token of validation text, read in whole windows, with weights in float32, bfloat16, int8 and fp8, and
  the bytes of all weights.
- memories: the same text read token by token with memories in float32 and in bfloat16.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from gdn2 import LanguageModel
from gdn2.config import read_config
from gdn2.data import Shards
from gdn2.decoding import DecodeStep
from gdn2.layers.decay import init_rate, init_step
from gdn2.layers.norm import l2_norm
from gdn2.model import find_checkpoint
from gdn2.ops.reference import recurrence

LENGTHS = (1_024, 4_096, 16_384)


def say(**row):
    print(json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def off(a, b):
    return float((a.double() - b).norm() / b.norm())


@torch.inference_mode()
def memory_error(heads=4, size=64, window=256):
    """Heads of random decays; inputs are made as they are needed, the same for each state."""
    torch.manual_seed(0)
    rate, delta = torch.empty(heads), torch.empty(heads * size)
    init_rate(rate)
    init_step(delta)
    dtypes = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
    states = {name: torch.zeros(1, heads, size, size, dtype=torch.float64) for name in dtypes}
    for begin in range(0, max(LENGTHS), window):
        shape = (1, window, heads, size)
        q, k = (l2_norm(torch.randn(shape, dtype=torch.float64)) for _ in range(2))
        v = F.silu(torch.randn(shape, dtype=torch.float64))
        b, w = (torch.sigmoid(torch.randn(shape, dtype=torch.float64)) for _ in range(2))
        f = 0.5 * torch.randn(shape) + delta.view(heads, size)
        g = -rate.exp()[:, None].double() * F.softplus(f.double())
        outputs = {}
        for name, dtype in dtypes.items():
            told, state = [], states[name]
            for t in range(window):
                o, state = recurrence(*(x[:, t : t + 1] for x in (q, k, v, g, b, w)), size**-0.5, state)
                state = state.to(dtype).double()
                told.append(o)
            outputs[name], states[name] = torch.cat(told, dim=1), state
        if begin + window in LENGTHS:
            for name in ("float32", "bfloat16"):
                say(
                    row="memory error", tokens=begin + window, memory=name,
                    output=off(outputs[name], outputs["float64"]), state=off(states[name], states["float64"]),
                )  # fmt: skip


@torch.inference_mode()
def weights_cost(model, tokens, targets):
    first = 0.0
    for kind in ("float32", "bfloat16", "int8", "fp8"):
        narrow = copy.deepcopy(model)
        narrow = narrow.bfloat16() if kind == "bfloat16" else narrow.quantize(kind) if kind != "float32" else narrow
        losses = [
            narrow.loss(t, u, reduction="none").double().sum()
            for t, u in zip(tokens.split(8), targets.split(8), strict=True)
        ]
        nats = float(sum(losses)) / targets.numel()
        first = first or nats
        size = sum(t.nbytes for t in (*narrow.parameters(), *narrow.buffers()))
        say(row="weights", weights=kind, MB=size / 1e6, nats=nats, perplexity=math.exp(nats), change=nats - first)


@torch.inference_mode()
def memories_cost(model, tokens, targets):
    first = 0.0
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        step, nats = DecodeStep(model, len(tokens), memory_dtype=dtype), 0.0
        for t in range(tokens.shape[1]):
            step.make_room(t + 1)
            nats += float(F.cross_entropy(step(tokens[:, t]), targets[:, t], reduction="sum"))
        nats /= targets.numel()
        first = first or nats
        say(
            row="memories", memories=name, state_KB=step.state_bytes / len(tokens) / 1e3, nats=nats,
            perplexity=math.exp(nats), change=nats - first,
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--windows", type=int, default=32, help="of validation text")
    parser.add_argument("--length", type=int, default=1_024, help="tokens of a window")
    parser.add_argument("--data", type=Path, help="folder of token shards; else the run's own")
    options = parser.parse_args()
    if options.run is None:
        memory_error()
        return
    config = read_config(find_checkpoint(options.run))
    model = LanguageModel.from_checkpoint(options.run)
    val = Shards(options.data or config.data.path).split("val")
    need = options.windows * options.length + 1
    text = torch.as_tensor(val.tokens[:need].astype("int64"))
    tokens, targets = (x.view(options.windows, options.length) for x in (text[:-1], text[1:]))
    say(row="text", windows=options.windows, length=options.length, model=str(options.run.name))
    weights_cost(model, tokens, targets)
    memories_cost(model, tokens, targets)


if __name__ == "__main__":
    main()
