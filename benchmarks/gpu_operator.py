"""How fast and how exact are the Triton kernels on this GPU? Ours, beside fla 0.6.0 on request, in one run.

    python benchmarks/gpu_operator.py [--fla] [--what time decode length error] [--json FILE]

bfloat16 operands with float32 log-decay, keys and queries normalised before. Times are medians, in milliseconds a
call, of ten calls in a row between two CUDA events, as in training, where the host runs ahead. The floor is each input
read and each result written once at the rate of a device copy. Errors are relative L2 against float64 on the same
rounded operands: the token-by-token reference, and the chunkwise form above 4,096 tokens. --fla needs
flash-linear-attention and fla-core 0.6.0, which search their configurations first, for minutes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import peers
import torch

from gdn2.ops import gated_delta_rule_2
from gdn2.ops.kernels import launch

SHAPES = [(8, 2048, 16, 128), (4, 4096, 16, 128), (2, 8192, 16, 128), (1, 16384, 16, 128)]  # B, T, H, K = V
LENGTHS = [4096, 16384, 65536, 262144]
DECODE_BATCHES = (1, 8, 64, 256)
CALLS = 10
KINDS = ("time", "decode", "length", "error")


def median_ms(call, warm=0.3, rounds=9, calls=CALLS):
    """Of a call, after `warm` seconds of it: the GPU's clock takes a while to rise."""
    began = time.perf_counter()
    while time.perf_counter() - began < warm:
        call()
        torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def copy_rate():
    """Bytes per second of a device copy, reads and writes counted."""
    x = torch.empty(2**29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x)) * 1e3


def timed(peer, shape, rate, calls=CALLS):
    tensors = peers.operands(*shape, tied=peer.tied)
    do = torch.randn_like(tensors[2])
    start = time.perf_counter()
    peer.both(tensors, do)
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
    forward = median_ms(lambda: peer.forward(tensors), calls=calls)
    both = median_ms(lambda: peer.both(tensors, do), calls=calls)
    return {
        "what": "time", "label": peer.label, "shape": shape, "forward_ms": round(forward, 3), "both_ms": round(both, 3),
        "forward_over_floor": round(forward / floor_forward, 1), "both_over_floor": round(both / floor_both, 1),
        "peak_MiB": round(peak / 2**20), "first_call_s": round(first_call, 1),
    }  # fmt: skip


def graphed_ms(call, calls):
    """Milliseconds of a call replayed from a CUDA graph: what its kernels take, without the host's share."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_ms(graph.replay, rounds=5, calls=calls)


def length(T, heads, D=128):
    """One sequence of T tokens, ours."""
    tensors = peers.operands(1, T, heads, D)
    do = torch.randn_like(tensors[2])
    scale, calls = D**-0.5, max(2, min(40, LENGTHS[-1] // T))

    def forward():
        launch.forward(*tensors, scale, None, None, False, False)

    def both():
        kept = launch.forward(*tensors, scale, None, None, False, True)[2]
        launch.backward(do, None, *tensors, scale, None, None, kept)

    row = {"what": "length", "label": "gdn2", "heads": heads, "T": T}
    for name, call in (("forward", forward), ("both", both)):
        ms = graphed_ms(call, calls)
        row |= {f"{name}_ms": round(ms, 3), f"{name}_ns_per_token": round(ms / T * 1e6, 1)}
    return row


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


INPUTS = {
    "random": {},
    "ragged": {"T": 250},
    "identical keys": {"keys": "identical"},
    "identical keys, no decay": {"keys": "identical", "decay": "none"},
    "no decay": {"decay": "none"},
    "-90 nats": {"decay": "-90"},
    "mixed decays": {"decay": "mixed"},
    "T = 131,072": {"T": 131072, "H": 2},
    "packed, some empty": {"lengths": [100, 0, 3, 64, 83, 1]},
}


def errors(candidates, kind, dtype=torch.bfloat16, T=256, H=16, lengths=None, **options):
    tensors = peers.operands(1, sum(lengths) if lengths else T, H, 128, seed=1, dtype=dtype, **options)
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths], device="cuda").cumsum(0)
    do = torch.randn_like(tensors[2])
    exact = [x.double().requires_grad_() for x in tensors]
    backend = "reference" if T <= 4096 else "torch"
    o, _ = gated_delta_rule_2(*exact, cu_seqlens=cu_seqlens, backend=backend)
    gradients = [g.cpu() for g in torch.autograd.grad(o, exact, do.double())]
    o = o.detach().cpu()
    del exact
    for peer in candidates:
        label = {"what": "error", "label": peer.label, "dtype": str(dtype).removeprefix("torch."), "inputs": kind}
        try:
            got, grads = peer.both(tensors, do, cu_seqlens)
        except Exception as error:  # whatever a peer raises stands in the table
            yield label | {"raised": repr(error)[:200]}
            continue
        row = {"o": relative(got.cpu(), o)}
        row |= {f"d {n}": relative(a.cpu(), b) for n, a, b in zip(peers.NAMES, grads, gradients)}
        yield label | {n: float(f"{e:.1e}") for n, e in row.items()}


def decode(label, step, B, H=16, D=128):
    tensors = peers.operands(B, 1, H, D)
    state = torch.randn(B, H, D, D, device="cuda")
    step(tensors, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            step(tensors, state)
    ms = median_ms(graph.replay, calls=3) / 20
    return {
        "what": "decode", "label": label, "batch": B, "us": round(ms * 1e3, 2),
        "state_TBps": round(2 * state.nbytes / ms / 1e9, 2),
    }  # fmt: skip


def rows(with_fla, what):
    rate = copy_rate()
    yield {"what": "device", "name": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_TBps": rate / 1e12}
    ours = peers.ours()
    if "time" in what:
        yield from (timed(peer, shape, rate) for peer in (ours, peers.ours_tied()) for shape in SHAPES)
    if "decode" in what:
        yield from (decode("gdn2", peers.our_step, B) for B in DECODE_BATCHES)
    if "length" in what:
        yield from (length(T, heads) for heads in (16, 4) for T in LENGTHS)
    if with_fla and "time" in what:
        yield from (timed(peer, shape, rate) for peer in (peers.fla(), peers.fla_tied()) for shape in SHAPES)
    if with_fla and "decode" in what:
        yield from (decode("fla 0.6.0 fused_recurrent_gdn2", peers.fla_step, B) for B in DECODE_BATCHES)
    if "error" in what:
        both = [ours, peers.fla()] if with_fla else [ours]
        for kind, options in INPUTS.items():
            yield from errors([ours], kind, torch.float32, **options)
            yield from errors(both, kind, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fla", action="store_true", help="time flash-linear-attention beside ours")
    parser.add_argument("--what", nargs="+", choices=KINDS, default=KINDS, help="kinds of rows to measure; else all")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    kept = []
    for row in rows(args.fla, args.what):
        print(json.dumps(row), flush=True)
        kept.append(row)
        torch.cuda.empty_cache()
        if args.json:
            args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
