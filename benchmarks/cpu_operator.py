"""How fast is the operator on this CPU? Ours beside fla-core's naive loops and the matrix-product floor, in one run.

    python benchmarks/cpu_operator.py [--threads N] [--json FILE]

Needs fla-core 0.6.0 (`pip install --no-deps fla-core==0.6.0`; only its file fla/ops/gdn2/naive.py is loaded). Times are
medians in milliseconds, the versions taking turns so that all see the same machine. The floor is the time of the chunk
form's matrix products alone, at the rate that torch.bmm reaches here on the operator's own tiles.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import time
from pathlib import Path

import torch

from gdn2.ops import gated_delta_rule_2

SHAPES = [(1, 1024, 4, 64), (4, 512, 4, 64)]  # B, T, H, K = V
CHUNK = 64


def naive_module():
    """fla-core's naive.py, loaded alone."""
    path = importlib.metadata.distribution("fla-core").locate_file("fla/ops/gdn2/naive.py")
    spec = importlib.util.spec_from_file_location("fla_naive_gdn2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(B, T, H, K):
    """q, k, v, log-decay, erase, write, all [B, T, H, K] float32; decays as the layer's initialisation spreads them."""
    torch.manual_seed(0)
    q, v = torch.randn(2, B, T, H, K)
    k = torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1)
    log_decay = -torch.exp(torch.empty(B, T, H, K).uniform_(-7, 0.5))
    erase, write = torch.rand(2, B, T, H, K)
    return [x.clone().requires_grad_() for x in (q, k, v, log_decay, erase, write)]


def chunk_flops(B, T, H, K, C=CHUNK):
    """Multiply-adds x 2 of the forward's products, for K = V: triangular ones counted by half."""
    scores = 2 * C * C * K  # T and A_qk
    inverse = C**3 // 3
    solve = 2 * C * C * K  # Y and U
    state = 6 * C * K * K  # Y S, K_tail^T R, Q_gamma S
    output = C * C * K  # A_qk R
    return B * H * (T // C) * (scores + inverse + solve + state + output)


def median_ms(calls, rounds):
    """Median time of each call, taken in turns."""
    times = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, seen in zip(calls, times):
            start = time.perf_counter()
            call()
            seen.append(time.perf_counter() - start)
    return [1e3 * statistics.median(seen) for seen in times]


def product_rate(B, T, H, K):
    """FLOP/s of one batched [C, K] x [K, K] product over all chunks."""
    a, b = torch.randn(B * H * T // CHUNK, CHUNK, K), torch.randn(B * H * T // CHUNK, K, K)
    (ms,) = median_ms([lambda: torch.bmm(a, b)], 50)
    return 2 * a.numel() * K / ms * 1e3


def forward(operator, tensors):
    def call():
        with torch.no_grad():
            return operator(*tensors)[0]

    return call


def both(operator, tensors):
    upstream = torch.randn_like(tensors[2])
    return lambda: torch.autograd.grad(operator(*tensors)[0], tensors, upstream)


def measure(B, T, H, K, rounds):
    naive = naive_module()
    tensors = inputs(B, T, H, K)
    ours, theirs = forward(gated_delta_rule_2, tensors)(), forward(naive.naive_chunk_gdn2, tensors)()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error < 1e-4, f"the two operators disagree: relative L2 distance {error:.1e}"
    operators = (gated_delta_rule_2, naive.naive_chunk_gdn2, naive.naive_recurrent_gdn2)
    floor = chunk_flops(B, T, H, K) / product_rate(B, T, H, K) * 1e3
    rows = []
    # The backward forms about 2.5 times the forward's products, so forward and backward together 3.5 times.
    for what, make, factor in (("forward", forward, 1.0), ("forward+backward", both, 3.5)):
        times = median_ms([make(op, tensors) for op in operators], rounds)
        row = dict(zip(("gdn2_ms", "naive_chunk_ms", "naive_recurrent_ms"), times))
        row |= {"speedup_chunk": times[1] / times[0], "speedup_recurrent": times[2] / times[0]}
        row |= {"floor_ms": floor * factor, "floor_share": floor * factor / times[0]}
        rows.append({"B": B, "T": T, "H": H, "K": K, "pass": what} | row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, float32, chunk {CHUNK}")
    print(
        f"{'shape':<18}{'pass':<18}{'gdn2':>9}{'chunk loop':>12}{'token loop':>12}{'floor':>8}   ratios and floor share"
    )
    rows = []
    for shape in SHAPES:
        for r in measure(*shape, arguments.rounds):
            rows.append(r)
            print(
                f"{'B{} T{} H{} K{}'.format(*shape):<18}{r['pass']:<18}{r['gdn2_ms']:>9.2f}{r['naive_chunk_ms']:>12.1f}"
                f"{r['naive_recurrent_ms']:>12.1f}{r['floor_ms']:>8.2f}   {r['speedup_chunk']:.1f}x "
                f"{r['speedup_recurrent']:.1f}x, {100 * r['floor_share']:.0f} % of the floor"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
