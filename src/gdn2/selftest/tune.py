"""Which configuration is fastest on this GPU? On request only; what wins and is right is kept with the verdicts.

First every trial is compiled and held to float64, each in a process of its own, since it may crash the GPU's context,
and many side by side. Then one process times the right ones, each in turns with the best so far: the GPU's clock rises
and falls by more than what they differ by. A trial changes one kernel, so that the winners of several kernels go
together; what they are together is held to every case of the self-test that would run with it.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
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

SHAPE = 4, 4096, 16  # sequences, tokens, heads
GAIN = 0.98  # of the time of the best so far, below which a trial wins
HEAD_SIZES = (128, 256)
CALLS, ROUNDS, WARM = 10, 9, 50  # calls of a time, times in turns, calls before


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

    `quick`: that of bfloat16 with heads of 128 alone, and nothing is kept. `jobs` trials are checked at a time.
    """
    shared = shared_memory(device)
    for dtype, size in product(("bfloat16", "float32"), HEAD_SIZES) if not quick else [("bfloat16", 128)]:
        name, config = named_config(getattr(torch, dtype), size, size, shared)
        if name in verdicts.load(device).wrong:
            yield f"{name}: refused by the self-test, not tuned"
            continue
        yield f"{name}: {config}"
        work = Work(name, dtype, size)
        cases = [x for x in check.CASES if isinstance(x, check.Case) and x.name(shared) == name]
        tried = list(trials(config))
        with ThreadPoolExecutor(check.processes(jobs)) as pool:
            each = (replace(config, **{kernel: value}) for kernel, value in tried)
            found = list(pool.map(partial(_wrong, work, case=check.Case(dtype, size, size)), each))
        for (kernel, value), wrong in zip(tried, found):
            if wrong:
                yield f"  {kernel} {value}: {wrong}"
        right = [trial for trial, wrong in zip(tried, found) if not wrong]
        best, lines = _raced(work, config, right)
        yield from (f"  {line}" for line in lines)
        wrong = ""
        if best != config:
            with ThreadPoolExecutor(check.processes(jobs)) as pool:
                found = list(pool.map(partial(_wrong, work, best), cases))
            wrong = next((f"{case}: {error}" for case, error in zip(cases, found) if error), "")
        if wrong:
            yield f"  together the winners are wrong, nothing is kept: {wrong}"
        elif quick:
            yield f"  best {best}"
        else:
            verdicts.update(device, partial(_with, name, best))
            yield f"  kept {best}"


def _with(name: str, config: Config, verdict: verdicts.Verdict) -> verdicts.Verdict:
    return replace(verdict, tuned=verdict.tuned | {name: config})


def race(
    time: Callable[[Config, Config], tuple[float, float]], best: Config, tried: Iterable[tuple[str, Any]]
) -> tuple[Config, list[str]]:
    """The best configuration, and a line for each trial; `time`: milliseconds of the best so far and of a trial."""
    lines = []
    for kernel, value in tried:
        trial = replace(best, **{kernel: value})
        least, ms = time(best, trial)
        lines.append(f"{kernel} {value}: {ms:.3f} ms forward and backward, {ms / least:.3f} of the best so far")
        if ms < GAIN * least:
            best = trial
    return best, lines


@dataclass(frozen=True)
class Work:
    """What a configuration of this name is timed with."""

    name: str
    dtype: str
    size: int

    def times(self, device: torch.device) -> Callable[[Config, Config], tuple[float, float]]:
        """Milliseconds, forward and backward, of two configurations in turns; the least of several."""
        dtype = getattr(torch, self.dtype)
        q, k, v, erase, write = torch.randn(5, *SHAPE, self.size, device=device, dtype=dtype).unbind()
        log_decay = -torch.rand(*SHAPE, self.size, device=device)
        operands = q, F.normalize(k, dim=-1), v, log_decay, erase.sigmoid(), write.sigmoid()
        leaves = [x.detach().requires_grad_() for x in operands]

        def milliseconds(config: Config, calls: int = CALLS) -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with using({self.name: config}):
                for call in range(calls + 1):
                    if call == 1:  # the first one plans anew
                        start.record()
                    o, _ = gated_delta_rule_2(*leaves, backend="triton")
                    torch.autograd.grad(o, leaves, v)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / calls

        def both(best: Config, trial: Config) -> tuple[float, float]:
            milliseconds(trial, WARM)
            times = [(milliseconds(best), milliseconds(trial)) for _ in range(ROUNDS)]
            first, second = (min(column) for column in zip(*times))
            return first, second

        return both


def _wrong(work: Work, config: Config, case: check.Case) -> str:
    """What is wrong with a configuration in this case, or ""."""
    try:
        _in_a_process("check", work, config, case=asdict(case))
    except subprocess.SubprocessError as error:
        return str(error)
    return ""


def _raced(work: Work, config: Config, tried: list[tuple[str, Any]]) -> tuple[Config, list[str]]:
    """`race` in a process of its own; the configuration as it is when that fails."""
    try:
        values, lines = json.loads(_in_a_process("race", work, config, tried=tried))
    except subprocess.SubprocessError as error:
        return config, [f"not timed: {error}"]
    return Config.of(values), lines


def _in_a_process(what: str, work: Work, config: Config, **more: Any) -> str:
    argument = {"what": what, "work": asdict(work), "config": asdict(config), **more}
    return check.last_line("gdn2.selftest.tune", json.dumps(argument))


def main() -> None:
    x = json.loads(sys.argv[1])
    work, config, device = Work(**x["work"]), Config.of(x["config"]), torch.device("cuda")
    if x["what"] == "check":
        case = check.Case(**x["case"])
        if wrong := check.judge(case, *check.measure(case, device, {work.name: config})):
            sys.exit(wrong)
    else:
        best, lines = race(work.times(device), config, [(kernel, tuple(value)) for kernel, value in x["tried"]])
        print(json.dumps([asdict(best), lines]))


if __name__ == "__main__":
    main()
