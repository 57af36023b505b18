"""How many tokens a second does each token mixer take, here? All of one size, on a GPU when there is one, in one run.

    python benchmarks/mixers.py [--size 50m] [--batch B] [--tokens T] [--decode-batch D] [--json FILE] ...

The mixers are those of the presets of a size, so that their memories have as many numbers and their blocks, with the
MLP, as many parameters. Every one runs on this project's code: on a GPU the recurrences on its Triton kernels, on a CPU
on its chunkwise form in torch, attention on torch's scaled_dot_product_attention. Where its authors have kernels made
for a mixer, those may be faster. Gated DeltaNet-2 alone has its whole decoding step fused into kernels.

forward, forward + backward: of the mixer alone, without a state to hand on, over B sequences of T tokens; the last
column is that of the whole block, in which the parameters are matched. decode: one token for each of D sequences (1 on
a CPU, 64 on a GPU) from a state T tokens into the text, the host's time included. Medians over rounds, in each of which
every mixer has its turn. float32 on a CPU, bfloat16 on a GPU, where the first run compiles for some minutes.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from gdn2 import preset
from gdn2.model import Block

MIXERS = ("gdn2", "kda", "gdn", "deltanet", "mamba2", "mamba3", "mamba3-mimo", "transformer", "transformer-full")
PASSES = ("forward", "forward + backward", "decode", "block, forward + backward")


def forward(module, x):
    with torch.no_grad():
        module(x, output_state=False)


def both(module, x):
    y, _ = module(x, output_state=False)
    torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))


def decode(mixer, token, state):
    with torch.no_grad():
        mixer(token, state)


def calls(name, size, batch, tokens, decode_batch, device, dtype):
    """The passes of one mixer, by name, as functions of no arguments."""
    torch.manual_seed(0)
    config = preset(f"{name}-{size}")
    with torch.device(device):
        block = Block(config, config.layer_kinds[0]).to(dtype)
        x = torch.randn(batch, tokens, config.d_model, dtype=dtype, requires_grad=True)
        with torch.no_grad():
            _, state = block.mixer(x[:1])
        token = torch.randn(decode_batch, 1, config.d_model, dtype=dtype)
    states = type(state)(*(t.repeat_interleave(decode_batch, dim=0) for t in state))
    return {
        "forward": partial(forward, block.mixer, x),
        "forward + backward": partial(both, block.mixer, x),
        "decode": partial(decode, block.mixer, token, states),
        "block, forward + backward": partial(both, block, x),
    }


def seconds(subjects, rounds, synchronize):
    """Median seconds of each call, after two calls to warm up."""
    seen = {name: [] for name in subjects}
    for turn in range(rounds + 2):
        for name, call in subjects.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if turn >= 2:
                seen[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seen.items()}


def measure(size, batch, tokens, decode_batch, rounds, device):
    """A row a mixer: its name, and tokens per second of each pass."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    subjects = {name: calls(name, size, batch, tokens, decode_batch, device, dtype) for name in MIXERS}
    rows = {name: {"mixer": name} for name in MIXERS}
    for what in PASSES:
        turns = 10 * rounds if what == "decode" else rounds  # a step is over in no time
        taken = seconds({name: passes[what] for name, passes in subjects.items()}, turns, synchronize)
        for name, s in taken.items():
            rows[name][what] = (decode_batch if what == "decode" else batch * tokens) / s
    return list(rows.values())


# What a run takes unless told: size of the presets, B, T, D and rounds.
DEFAULTS = {"cpu": ("10m", 1, 2_048, 1, 7), "cuda": ("1.3b", 4, 4_096, 64, 10)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", help="of the presets")
    parser.add_argument("--batch", type=int, help="sequences, B")
    parser.add_argument("--tokens", type=int, help="of a sequence, T")
    parser.add_argument("--decode-batch", type=int, help="sequences that decode, D")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    for name, value in zip(("size", "batch", "tokens", "decode_batch", "rounds"), DEFAULTS[args.device]):
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    device = args.device
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads"
    numbers = "bfloat16" if device == "cuda" else "float32"
    print(f"{where}, torch {torch.__version__}, {numbers}, size {args.size}, {args.batch} x {args.tokens} tokens, "
          f"decoding {args.decode_batch}; thousand tokens per second\n")  # fmt: skip
    started = time.perf_counter()
    rows = measure(args.size, args.batch, args.tokens, args.decode_batch, args.rounds, device)
    print(f"| mixer | {' | '.join(PASSES)} |")
    print("|---" * (len(PASSES) + 1) + "|")
    for row in rows:
        print(f"| {row['mixer']} | " + " | ".join(f"{row[what] / 1e3:,.2f}" for what in PASSES) + " |")
    print(f"\n{time.perf_counter() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
