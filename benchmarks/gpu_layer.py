"""What the layer does around its operator on a GPU: each fused operation beside the torch operations it replaces.

    python benchmarks/gpu_layer.py [--json FILE]

Times are medians over replays of a CUDA graph, so that the host's part is left out. `floor` is the time of a plain copy
of as many bytes as the operation must read and write once; the copy's rate is measured in the same run. Takes a minute.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from gdn2.layers.norm import GatedRMSNorm, RMSNorm, l2_norm
from gdn2.ops import fused
from gdn2.ops.kernels import decode
from gdn2.ops.short_conv import short_conv

B, T, H, D, D_MODEL, WIDTH = 4, 4096, 16, 128, 2304, 4
DECODE_BATCHES = (1, 8, 64, 256)


def median_ms(call, rounds=20):
    """Of replays of a graph of `call`; two calls first, on another stream, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def host_us(call, rounds=50):
    """Of the host, per call, while the GPU keeps up or not."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / rounds * 1e6


def copy_rate():
    """Bytes per second of a device copy, reads and writes counted."""
    x = torch.empty(2**29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x)) * 1e3


def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def operations():
    """Name, function of no arguments, its inputs, and the bytes a forward and a backward must move."""
    x, gate = leaf(B, T, H * D), leaf(B, T, H, D)
    n = x.nbytes
    taps = leaf(H * D, WIDTH, dtype=torch.float32)
    yield "short convolution", lambda: short_conv(x, taps, output_tail=False)[0], [x, taps], 2 * n, 3 * n
    heads = leaf(B, T, H, D)
    yield "L2 norm", lambda: l2_norm(heads), [heads], 2 * n, 3 * n
    norm = GatedRMSNorm(D).cuda()
    yield "gated RMSNorm", lambda: norm(heads, gate), [heads, gate, norm.weight], 3 * n, 5 * n
    plain, hidden = RMSNorm(D_MODEL).cuda(), leaf(B, T, D_MODEL)
    yield "RMSNorm", lambda: plain(hidden), [hidden, plain.weight], 2 * hidden.nbytes, 3 * hidden.nbytes


def timed(name, function, inputs, forward_bytes, backward_bytes, rate):
    with torch.no_grad():
        outputs = function()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(y) for y in outputs]

    def forward():
        with torch.no_grad():
            function()

    def both():
        torch.autograd.grad(function(), inputs, upstream)

    row = {"what": "operation", "name": name}
    for label, devices in (("fused", ("cuda",)), ("torch", ())):
        fused.DEVICES = devices
        row |= {f"{label}_forward_us": round(median_ms(forward) * 1e3, 1)}
        row |= {f"{label}_both_us": round(median_ms(both) * 1e3, 1), f"{label}_both_host_us": round(host_us(both))}
    fused.DEVICES = ("cuda",)
    floor = forward_bytes / rate * 1e6, (forward_bytes + backward_bytes) / rate * 1e6
    return row | {
        "floor_forward_us": round(floor[0], 1), "floor_both_us": round(floor[1], 1),
        "forward_over_floor": round(row["fused_forward_us"] / floor[0], 2),
        "both_over_floor": round(row["fused_both_us"] / floor[1], 2),
    }  # fmt: skip


def decoded(batch):
    """A step of everything between the projections on a pool, and the bandwidth of its states, read and written."""
    channels = H * D
    token = decode.Token(*(leaf(batch, channels).detach() for _ in range(7)))
    weights = decode.Weights(
        *(leaf(channels, WIDTH, dtype=torch.float32).detach() for _ in range(3)),
        *(leaf(n, dtype=torch.float32).detach() for n in (H, channels, D)),
    )
    pool = decode.State(
        *(leaf(batch, WIDTH - 1, channels).detach() for _ in range(3)), torch.randn(batch, H, D, D, device="cuda")
    )
    slots = torch.randperm(batch, device="cuda")
    # Several layers' worth of states, so that none is still in the cache when its turn comes again.
    pools = [decode.State(*(t.clone() for t in pool)) for _ in range(max(1, 256 // batch))]

    def step():
        for p in pools:
            decode.decode_in_place(token, weights, p, slots, scale=D**-0.5, largest_erase=1.0, norm_eps=1e-5)

    us = median_ms(step) / len(pools) * 1e3
    return {"what": "decode", "batch": batch, "us": round(us, 2), "state_TBps": round(2 * pool[3].nbytes / us / 1e6, 2)}


def rows():
    rate = copy_rate()
    yield {"what": "device", "name": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_TBps": rate / 1e12}
    yield from (timed(*operation, rate) for operation in operations())
    yield from (decoded(batch) for batch in DECODE_BATCHES)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    kept = []
    for row in rows():
        print(json.dumps(row), flush=True)
        kept.append(row)
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
