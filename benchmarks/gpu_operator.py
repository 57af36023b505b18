"""How fast and how exact are the Triton kernels on this GPU? Ours, beside fla 0.6.0 on request, in one run.

    python benchmarks/gpu_operator.py [--fla] [--json FILE]

Times are medians of CUDA events, in milliseconds, on bfloat16 operands with float32 log-decay; keys and queries are
normalised before. The floor is each input read and each result written once at the rate of a device copy. Errors are
relative L2 against the token-by-token reference in float64 on the same rounded operands. --fla needs
flash-linear-attention 0.6.0 and autotunes it first, for minutes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from gdn2.ops.kernels import launch
from gdn2.ops.reference import recurrence

SHAPES = [(4, 4096, 16, 128), (1, 16384, 16, 128), (8, 2048, 16, 128), (2, 8192, 16, 128)]  # B, T, H, K = V
DECODE_BATCHES = (1, 8, 64, 256)
NAMES = ("q", "k", "v", "log_decay", "erase", "write")
DECAYS = ("layer", "none", "-90", "mixed")


def operands(B, T, H, D, decay="layer", seed=0, dtype=torch.bfloat16):
    """The six operands; the decays as the layer's initialisation draws them, or constant, or a mixture of extremes."""
    torch.manual_seed(seed)
    normal = lambda: torch.randn(B, T, H, D, device="cuda")  # noqa: E731
    q, k, v = F.normalize(normal(), dim=-1), F.normalize(normal(), dim=-1), normal() / 2
    erase, write = torch.rand(2, B, T, H, D, device="cuda")
    rate = torch.empty(H, 1, device="cuda").uniform_(1, 16)
    dt = torch.empty(H, D, device="cuda").uniform_(-6.9, -2.3).exp()
    log_decay = -rate * F.softplus(0.3 * normal() + torch.log(torch.expm1(dt)))
    if decay in ("none", "-90"):
        log_decay = torch.full_like(log_decay, 0.0 if decay == "none" else -90.0)
    elif decay == "mixed":
        log_decay = torch.where(torch.rand_like(log_decay) < 0.1, 1e3 * log_decay, 0.1 * log_decay)
    low = [x.to(dtype) for x in (q, k, v, erase, write)]
    return [*low[:3], log_decay, *low[3:]]


class Ours:
    label = "gdn2"

    def forward(self, tensors):
        return launch.forward(*tensors, tensors[0].shape[-1] ** -0.5, None, None, False, False)[0]

    def both(self, tensors, do):
        scale = tensors[0].shape[-1] ** -0.5
        o, _, residuals = launch.forward(*tensors, scale, None, None, False, True)
        return o, launch.backward(do, None, *tensors, scale, None, None, residuals)[:6]


class Fla:
    label = "fla 0.6.0"

    def __init__(self):
        from fla.ops.gdn2 import chunk_gdn2

        self.rule = chunk_gdn2

    def forward(self, tensors):
        with torch.no_grad():
            return self.rule(*tensors)[0]

    def both(self, tensors, do):
        leaves = [x.detach().requires_grad_() for x in tensors]
        o = self.rule(*leaves)[0]
        return o, torch.autograd.grad(o, leaves, do)


def median_ms(call, warm=5, rounds=20):
    for _ in range(warm):
        call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_rate():
    """Bytes per second of a device copy, reads and writes counted."""
    x = torch.empty(2**29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x)) * 1e3


def timed(peer, shape, rate):
    tensors = operands(*shape)
    do = torch.randn_like(tensors[2])
    start = time.perf_counter()
    peer.both(tensors, do)
    peer.forward(tensors)
    torch.cuda.synchronize()
    first_call = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    peer.both(tensors, do)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    read = sum(x.nbytes for x in tensors)
    floor_forward = (read + do.nbytes) / rate * 1e3
    floor_both = (3 * read + 2 * do.nbytes) / rate * 1e3
    forward, both = median_ms(lambda: peer.forward(tensors)), median_ms(lambda: peer.both(tensors, do))
    return {
        "what": "time", "label": peer.label, "shape": shape, "forward_ms": round(forward, 3), "both_ms": round(both, 3),
        "forward_over_floor": round(forward / floor_forward, 1), "both_over_floor": round(both / floor_both, 1),
        "peak_MiB": round(peak / 2**20), "first_call_s": round(first_call, 1),
    }  # fmt: skip


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def errors(peers, decay, dtype=torch.bfloat16, shape=(1, 256, 16, 128)):
    tensors = operands(*shape, decay=decay, seed=1, dtype=dtype)
    do = torch.randn_like(tensors[2])
    exact = [x.double().requires_grad_() for x in tensors]
    o, _ = recurrence(*exact, shape[-1] ** -0.5)
    gradients = torch.autograd.grad(o, exact, do.double())
    for peer in peers:
        ours, grads = peer.both(tensors, do)
        row = {"o": relative(ours, o)} | {f"d {n}": relative(a, b) for n, a, b in zip(NAMES, grads, gradients)}
        yield {
            "what": "error", "label": peer.label, "dtype": str(dtype).removeprefix("torch."), "decay": decay,
            **{n: float(f"{e:.1e}") for n, e in row.items()},
        }  # fmt: skip


def decode(B, H=16, D=128):
    tensors = [x[:, 0] for x in operands(B, 1, H, D)]
    state = torch.randn(B, H, D, D, device="cuda")
    launch.step(*tensors, D**-0.5, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            launch.step(*tensors, D**-0.5, state)
    ms = median_ms(graph.replay) / 20
    return {"what": "decode", "batch": B, "us": round(ms * 1e3, 2), "state_TBps": round(2 * state.nbytes / ms / 1e9, 2)}


def rows(with_fla):
    rate = copy_rate()
    yield {"what": "device", "name": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_TBps": rate / 1e12}
    peers = [Ours()]
    yield from (timed(peers[0], shape, rate) for shape in SHAPES)
    yield from (decode(B) for B in DECODE_BATCHES)
    yield from (row for decay in DECAYS for row in errors(peers, decay, torch.float32))
    if with_fla:
        peers.append(Fla())
        yield from (timed(peers[1], shape, rate) for shape in SHAPES)
    yield from (row for decay in DECAYS for row in errors(peers, decay))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fla", action="store_true", help="time flash-linear-attention beside ours")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    kept = []
    for row in rows(args.fla):
        print(json.dumps(row), flush=True)
        kept.append(row)
        torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
