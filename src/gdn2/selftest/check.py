"""Is every configuration that this GPU can select right? Each is held to float64, outputs and all gradients.

A case runs in a process of its own (`python -m gdn2.selftest.check NUMBER`), so that one that crashes the GPU's
context, or hangs, ends alone. `selftest` runs them side by side and keeps the verdict, by which the operator refuses
what is wrong.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.kernels import verdicts
from gdn2.ops.kernels.configs import named_config, shared_memory, using
from gdn2.ops.kernels.tables import Config
from gdn2.ops.projected import rule_from_projections
from gdn2.ops.rules import gated_delta_rule_2
from gdn2.selftest import parts
from gdn2.selftest.compare import relative, with_gradients, worst

# Relative L2 of outputs and of gradients, twice what rounding explains; wrong kernels were off by a tenth and more. The
# products around the operator of a layer round too. Its worst gradient is that of the decay's rate, 3.9e-2 on an H100:
# one number a head, the sum of all tokens' and channels' shares, which nearly cancel; all others are below 1.4e-2.
BOUNDS = {"float32": (1e-5, 5e-5), "bfloat16": (1e-2, 2e-2), "float16": (1e-2, 2e-2)}
LAYER_BOUNDS = {"float32": (1e-5, 5e-5), "bfloat16": (3e-2, 5e-2), "float16": (3e-2, 8e-2)}
TIMEOUT = 600  # seconds for a case, compilation included
# Lengths, for the narrow tiles of a scan and for the wide ones; both are of several chunks.
LONG, MANY = [130, 0, 70, 1], [130, 0, 70, *[7, 0, 3, 9, 1, 5] * 5]
SEGMENT = 1  # chunks, where sequences are cut
SEQUENCES = 5  # of one token
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """The operator on 2 key heads. Gates are "channel", "head" (shared by its channels) or "none"."""

    dtype: str
    K: int = 128
    V: int = 128
    group: int = 1  # value heads per key head
    decay: str = "channel"
    erase: str = "channel"
    write: str = "channel"
    projected: bool = False  # activations inside
    cut: bool = False  # into segments

    def name(self, shared: int) -> str:
        return named_config(getattr(torch, self.dtype), self.K, self.V, shared)[0]

    def __str__(self) -> str:
        gates = f"decay {self.decay}, erase {self.erase}, write {self.write}"
        extra = [text for flag, text in ((self.group > 1, "grouped"), (self.cut, "segments")) if flag]
        return ", ".join([f"{self.K}/{self.V}", gates, "activations inside" if self.projected else "given", *extra])


@dataclass(frozen=True)
class StepCase:
    """The layer's decoding step, and what else a model's step consists of."""

    dtype: str

    def name(self, shared: int) -> str:
        return verdicts.DECODE

    def __str__(self) -> str:
        return "a layer, one token at a time"


@dataclass(frozen=True)
class LayerCase:
    """A training pass: a layer with its convolutions and norms, and what else blocks and the loss consist of; with the
    gradients of all parameters."""

    dtype: str

    def name(self, shared: int) -> str:
        return verdicts.AROUND

    def __str__(self) -> str:
        return "a layer with its convolutions and norms, attention, MLP and loss"


def _cases() -> Iterator[Case | StepCase | LayerCase]:
    for dtype in ("bfloat16", "float32", "float16"):
        plain = Case(dtype)
        yield plain
        yield replace(plain, projected=True)
        yield replace(plain, K=256, V=256)
        yield LayerCase(dtype)
        yield StepCase(dtype)
        if dtype == "float16":  # the rest is compiled as for bfloat16
            return
        for K, V in ((16, 16), (64, 64), (48, 100), (192, 96), (128, 256)):
            yield replace(plain, K=K, V=V)
        yield replace(plain, K=256, V=256, projected=True)
        yield replace(plain, group=2)
        yield replace(plain, cut=True)
        for decay, erase, write in (
            ("channel", "head", "head"), ("head", "head", "head"), ("none", "head", "head"), ("head", "none", "none"),
        ):  # fmt: skip
            yield replace(plain, decay=decay, erase=erase, write=write)
        yield replace(plain, erase="head", write="head", projected=True)


CASES = tuple(_cases())
QUICK = tuple(n for n, case in enumerate(CASES) if isinstance(case, Case) and case == Case(case.dtype))


class Finding(NamedTuple):
    """`output` and `gradient`: the worst relative L2 errors, of one head, or None. `wrong`: why it is, or ""."""

    number: int
    name: str
    what: str
    output: float | None
    gradient: float | None
    wrong: str
    seconds: float


def measure(
    case: Case | StepCase | LayerCase, device: torch.device, configs: dict[str, Config] | None = None
) -> tuple[float, float, str]:
    """Worst errors of outputs and of gradients, and the name of the worst gradient; `configs` as for `using`."""
    errors: dict[str, float] = {}
    with using(configs or {}, SEGMENT if isinstance(case, Case) and case.cut else 0):
        if isinstance(case, StepCase):
            return parts.step_errors(getattr(torch, case.dtype), device)
        if isinstance(case, LayerCase):
            return parts.layer_errors(getattr(torch, case.dtype), device)
        for lengths in (LONG,) if case.cut else (LONG, MANY):
            for name, error in _rule_errors(case, lengths, device).items():
                errors[name] = max(error, errors.get(name, 0.0))
        return worst(errors if case.projected else errors | _token_errors(case, device))


def _draw(case: Case, tokens: int, sequences: int, device: torch.device) -> dict[str, Tensor | None]:
    """Head 0 has ordinary decays, head 1 every kind up to 10,000 nats a token."""
    torch.manual_seed(0)
    H, HV = 2, 2 * case.group
    width = {"channel": (case.K, case.V), "head": (1, 1)}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def gate(kind: str, heads: int, side: int, size: float = 1.0) -> Tensor | None:
        return None if kind == "none" else size * normal(1, tokens, heads, width[kind][side])

    x: dict[str, Tensor | None] = {"q": normal(1, tokens, H, case.K), "k": normal(1, tokens, H, case.K)}
    x["v"] = normal(1, tokens, HV, case.V)
    state = normal(sequences, HV, case.K, case.V)
    decay, erase, write = gate(case.decay, H, 0), gate(case.erase, H, 0), gate(case.write, HV, 1)
    if case.projected:
        channels = case.K if case.decay == "channel" else 1
        rate = {"rate": normal(H), "delta": normal(H * channels) - 4}
        return {**x, "decay": decay, "erase": erase, "write": write, **rate, "state": state}
    if decay is not None:
        kinds = torch.tensor([0, -1e-3, -1, -25, -90, -1e4], device=device)
        decay = -0.3 * decay.abs()
        decay[:, :, 1] = kinds[torch.randint(0, 6, decay[:, :, 1].shape, device=device)]
    x["k"] = F.normalize(normal(1, tokens, H, case.K), dim=-1)
    gates = (None if g is None else g.sigmoid() for g in (erase, write))
    return {**x, "log_decay": decay, **dict(zip(("erase", "write"), gates)), "state": state}


def _rule_errors(case: Case, lengths: list[int], device: torch.device) -> dict[str, float]:
    dtype = getattr(torch, case.dtype)
    drawn = _draw(case, sum(lengths), len(lengths), device)
    exact = ("log_decay", "rate", "delta", "state")
    ours = {n: None if x is None else x.to(torch.float32 if n in exact else dtype) for n, x in drawn.items()}
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    rule: Callable[..., tuple[Tensor, Tensor | None]] = rule_from_projections if case.projected else gated_delta_rule_2
    results = []
    for where, kind, backend in ((device, None, "triton"), (CPU, torch.float64, "reference")):
        leaves = {
            n: None if x is None else x.detach().to(where, kind or x.dtype).requires_grad_() for n, x in ours.items()
        }
        call = partial(
            rule,
            *(x for n, x in leaves.items() if n != "state"),
            initial_state=leaves["state"],
            output_final_state=True,
            cu_seqlens=cu_seqlens.to(where),
            backend=backend,
        )
        o, state = call()
        assert state is not None  # it was asked for
        found = with_gradients({"o": o, "state": state}, {n: x for n, x in leaves.items() if x is not None})
        if backend == "triton":  # kernels of their own where no backward follows
            with torch.no_grad():
                o, state = call()
            assert state is not None
        results.append(found | {"inference o": o, "inference state": state})
    heads = {"state": 1, "inference state": 1, "d state": 1, "d rate": 0}
    return {n: relative(x, results[1][n], heads.get(n, 2)) for n, x in results[0].items()}


@torch.no_grad()
def _token_errors(case: Case, device: torch.device) -> dict[str, float]:
    """Of one token each of several sequences, for which the operator has a kernel of its own."""
    drawn = _draw(case, SEQUENCES, SEQUENCES, device)
    state = drawn.pop("state")
    assert state is not None
    ours = {
        n: None
        if x is None
        else x.transpose(0, 1).to(torch.float32 if n == "log_decay" else getattr(torch, case.dtype))
        for n, x in drawn.items()
    }
    o, after = gated_delta_rule_2(**ours, initial_state=state, output_final_state=True, backend="triton")  # type: ignore[arg-type]
    exact = {n: None if x is None else x.double().cpu() for n, x in ours.items()}
    options = {"initial_state": state.double().cpu(), "output_final_state": True, "backend": "reference"}
    right_o, right_state = gated_delta_rule_2(**exact, **options)  # type: ignore[arg-type]
    assert after is not None
    assert right_state is not None
    return {"one token's o": relative(o, right_o, 2), "one token's state": relative(after, right_state, 1)}


def judge(case: Case | StepCase | LayerCase, output: float, gradient: float, which: str) -> str:
    """Why errors as from `measure` are too large for a case, or ""."""
    bounds = (BOUNDS if isinstance(case, Case) else LAYER_BOUNDS)[case.dtype]
    if not output <= bounds[0]:
        return f"outputs are off by {output:.1e}, {bounds[0]:.0e} are allowed"
    if not gradient <= bounds[1]:
        return f"{which} is off by {gradient:.1e}, {bounds[1]:.0e} are allowed"
    return ""


def find(number: int, shared: int, run: Callable[[int], tuple[float, float, str]]) -> Finding:
    """What `run` says of case `number`; a case that fails to end is wrong."""
    case, start = CASES[number], time.perf_counter()
    output = gradient = None
    try:
        output, gradient, which = run(number)
        wrong = judge(case, output, gradient, which)
    except subprocess.SubprocessError as error:
        wrong = str(error)
    return Finding(number, case.name(shared), str(case), output, gradient, wrong, time.perf_counter() - start)


def _in_a_process(number: int) -> tuple[float, float, str]:
    """`measure` case `number` in a process of its own. SubprocessError when it does not end well."""
    output, gradient, which = json.loads(last_line("gdn2.selftest.check", str(number)))
    return float(output), float(gradient), str(which)


def last_line(module: str, argument: str) -> str:
    """What `python -m module argument` prints last. SubprocessError when it fails or does not end."""
    command = [sys.executable, "-m", module, argument]
    # Several run at a time: with a thread for every core in each they would wait for one another.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise subprocess.SubprocessError(f"no end within {TIMEOUT} s") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        raise subprocess.SubprocessError(said[:300])
    return (done.stdout.splitlines() or [""])[-1]


def processes(jobs: int | None) -> int:
    """How many at a time: `jobs`, else one for each CPU core up to 8."""
    return jobs or min(8, os.cpu_count() or 1)


def selftest(device: torch.device, quick: bool = False, jobs: int | None = None) -> Iterator[Finding]:
    """The findings as they come in; at the end the verdict is on disk. `quick`: heads of 128 alone, and no verdict.

    `jobs`: cases at a time, see `processes`.
    """
    numbers = QUICK if quick else tuple(range(len(CASES)))
    shared, wrong = shared_memory(device), {}
    verdicts.load(device)  # says now, not after minutes, where it cannot be kept
    with ThreadPoolExecutor(processes(jobs)) as pool:
        for finding in pool.map(lambda n: find(n, shared, _in_a_process), numbers):
            if finding.wrong:
                wrong[finding.name] = f"{finding.what}: {finding.wrong}"
            yield finding
    if not quick:
        verdicts.update(device, partial(_after, wrong))


def _after(wrong: dict[str, str], before: verdicts.Verdict) -> verdicts.Verdict:
    """The verdict: what was measured for a wrong name is dropped, so that the table's values are checked next."""
    return verdicts.Verdict(True, wrong, {name: x for name, x in before.tuned.items() if name not in wrong})


def main() -> None:
    device = torch.device("cuda")
    print(json.dumps(measure(CASES[int(sys.argv[1])], device, verdicts.load(device).tuned)))


if __name__ == "__main__":
    main()
