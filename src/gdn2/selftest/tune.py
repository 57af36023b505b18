"""Which configuration is fastest on this GPU? On request only; what wins and is right is kept with the verdicts.

Fields of a configuration are tried one after the other, each trial in a process of its own
(`python -m gdn2.selftest.tune NAME VALUES`), which times forward and backward and holds the trial to float64. Before,
all trials run side by side, for Triton to compile them: those times are worth nothing.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.configs import named_config, shared_memory, using
from gdn2.ops.kernels.tables import Config
from gdn2.ops.rules import gated_delta_rule_2
from gdn2.selftest import check

SHAPE = 4, 2048, 16  # sequences, tokens, heads
GAIN = 0.98  # of the time of the best so far, below which a trial wins
HEAD_SIZES = (128, 256)


def trials(config: Config) -> Iterator[tuple[str, Any]]:
    """Field and value: other warps, stages and tiles of one kernel at a time, of the kernels that take most time."""
    BK, BV, warps, stages = config.prepare
    yield from (("prepare", (BK, BV, warps, other)) for other in (1, 2, 3) if other != stages)
    yield "prepare", (BK, BV, 2 * warps, stages)
    BV, warps, stages = config.scan
    yield from (("scan", (BV, warps, other)) for other in (1, 2, 3, 4) if other != stages)
    yield "scan", (2 * BV, 2 * warps, stages)
    BV, warps, stages = config.value
    yield from (("value", (BV, warps, other)) for other in (2, 3) if other != stages)
    yield "value", (2 * BV, 2 * warps, stages)
    BK, BV, warps, stages = config.key
    yield from (("key", (BK, BV, warps, other)) for other in (1, 2, 3) if other != stages)
    yield "key", (BK, BV, 2 * warps, stages)


def tune(device: torch.device, quick: bool = False, jobs: int | None = None) -> Iterator[str]:
    """Tune the configurations of this GPU that are not known to be wrong; a line of text for each trial.

    `quick`: that of bfloat16 with heads of 128 alone, and nothing is kept. `jobs` trials are compiled at a time.
    """
    shared = shared_memory(device)
    for dtype, size in product(("bfloat16", "float32"), HEAD_SIZES) if not quick else [("bfloat16", 128)]:
        name, best = named_config(getattr(torch, dtype), size, size, shared)
        verdict = verdicts.load(device)
        if name in verdict.wrong:
            yield f"{name}: refused by the self-test, not tuned"
            continue
        tried = [replace(best, **{field: value}) for field, value in trials(best)]
        with ThreadPoolExecutor(check.processes(jobs)) as pool:
            list(pool.map(partial(_attempt, name, dtype, size), tried))
        least = _trial(name, dtype, size, best)
        yield f"{name}: {least:.3f} ms forward and backward"
        for field, value in trials(best):
            trial = replace(best, **{field: value})
            ms = _attempt(name, dtype, size, trial)
            if isinstance(ms, str):
                yield f"  {field} {value}: {ms}"
                continue
            yield f"  {field} {value}: {ms:.3f} ms"
            if ms < GAIN * least:
                best, least = trial, ms
        if quick:
            yield f"  best {best}"
        else:
            verdict.tuned[name] = best
            verdicts.save(device, verdict)
            yield f"  kept {best}"


def _attempt(name: str, dtype: str, size: int, config: Config) -> float | str:
    """`_trial`, or what is wrong with it."""
    try:
        return _trial(name, dtype, size, config)
    except subprocess.SubprocessError as error:
        return str(error)


def _trial(name: str, dtype: str, size: int, config: Config) -> float:
    """Milliseconds. SubprocessError when it fails, is wrong or does not end."""
    argument = json.dumps({"name": name, "dtype": dtype, "size": size, "config": asdict(config)})
    command = [sys.executable, "-m", "gdn2.selftest.tune", argument]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=check.TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise subprocess.SubprocessError(f"no end within {check.TIMEOUT} s") from None
    if done.returncode != 0:
        raise subprocess.SubprocessError((done.stderr.strip() or "failed").splitlines()[-1][:200])
    return float(done.stdout.splitlines()[-1])


def _checked_time(name: str, dtype: str, size: int, config: Config, device: torch.device) -> float:
    """Milliseconds. ValueError when the errors are beyond the self-test's bounds."""
    output, gradient, worst = check.measure(check.Case(dtype, size, size), device, {name: config})
    bounds = check.BOUNDS[dtype]
    if not (output <= bounds[0] and gradient <= bounds[1]):
        raise ValueError(f"outputs are off by {output:.1e}, {worst} by {gradient:.1e}")
    q, k, v, erase, write = torch.randn(5, *SHAPE, size, device=device, dtype=getattr(torch, dtype)).unbind()
    log_decay = -torch.rand(*SHAPE, size, device=device)
    operands = q, F.normalize(k, dim=-1), v, log_decay, erase.sigmoid(), write.sigmoid()
    leaves = [x.detach().requires_grad_() for x in operands]
    times = []
    with using({name: config}):
        for _ in range(12):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            o, _ = gated_delta_rule_2(*leaves, backend="triton")
            torch.autograd.grad(o, leaves, v)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return sorted(times[2:])[5]


def main() -> None:
    x = json.loads(sys.argv[1])
    print(_checked_time(x["name"], x["dtype"], x["size"], Config.of(x["config"]), torch.device("cuda")))


if __name__ == "__main__":
    main()
