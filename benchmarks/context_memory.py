"""Memory and time of one text against the tokens behind it: a state of fixed size beside a cache that grows.

    python benchmarks/context_memory.py [--models gdn2-tiny transformer-full-tiny] [--contexts 1024 32768 1048576]

On a CPU, each measurement in a process of its own. A model of random weights reads a text of that many tokens in chunks
of 1,024; full attention, for which that takes the square of the length, has its cache filled with random numbers
instead beyond --read tokens. Then it takes steps. A row has the seconds to read, the bytes of the state, by how much
the process grew from before the text to its end, its peak beyond that (Linux), and the milliseconds of a step.
"""

import argparse
import json
import subprocess
import sys
import time

import psutil
import torch

from gdn2 import LanguageModel, preset
from gdn2.decoding import DecodeStep
from gdn2.inference import Session
from gdn2.layers import AttentionState
from gdn2.layers.state import state_bytes, with_room

CHUNK = 1_024
STEPS = 20


def peak() -> int:
    """Of the process's resident memory so far, in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def measure(name: str, context: int, read: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = LanguageModel(preset(name)).eval()
    full = model.config.window is None and "attention" in model.config.layer_kinds
    Session(model, CHUNK, keep=0).read([0] * CHUNK)  # so that what any pass allocates is there before
    process = psutil.Process()
    before, row = process.memory_info().rss, {}
    if full and context > read:
        state = model.initial_state(1)
        state = with_room(state, context)
        for block in state:
            if isinstance(block, AttentionState):
                block.keys.normal_()
                block.values.normal_()
                block.position.fill_(context)
    else:
        session, start = Session(model, CHUNK, keep=0), time.perf_counter()
        tokens = torch.randint(0, model.config.vocab_size, (context,), generator=torch.Generator().manual_seed(0))
        for piece in tokens.split(CHUNK):
            session.read(piece.tolist())
        row["read_s"] = round(time.perf_counter() - start, 2)
        state = session.snapshot().state
    row |= {
        "state_bytes": state_bytes(state),
        "process_grew_MB": round((process.memory_info().rss - before) / 1e6, 1),
        "peak_MB": round((peak() - before) / 1e6, 1),
    }
    step = DecodeStep(model, 1)
    step.make_room(context + STEPS + 1)
    step.load(state)
    del state
    step([0])
    start = time.perf_counter()
    for _ in range(STEPS):
        step([0])
    return row | {"step_ms": round((time.perf_counter() - start) / STEPS * 1e3, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gdn2-tiny", "gdn2-hybrid-tiny", "transformer-full-tiny"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1_024, 32_768, 1_048_576])
    parser.add_argument("--read", type=int, default=8_192, help="longest text that full attention really reads")
    parser.add_argument("--one", action="store_true", help="measure one row here, in this process")
    options = parser.parse_args()
    for model in options.models:
        for context in options.contexts:
            if options.one:
                print(json.dumps({"model": model, "tokens": context} | measure(model, context, options.read)))
            else:
                one = ["--one", "--models", model, "--contexts", str(context), "--read", str(options.read)]
                subprocess.run([sys.executable, __file__, *one], check=True)


if __name__ == "__main__":
    main()
