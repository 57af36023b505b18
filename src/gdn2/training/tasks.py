"""Train a small model on a synthetic task and measure it: one call, made to be called hundreds of times.

Batches are drawn on the device. On a GPU a whole step, from the draw to the update, is recorded once per load as a CUDA
graph and replayed, so that Python only says "again". Nothing waits for the device until the end.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.config import ModelConfig, OptimConfig, check_device, require
from gdn2.data.synthetic import Questions, SyntheticTask
from gdn2.layers import AttentionState
from gdn2.model import LanguageModel
from gdn2.training.optim import adamw, learning_rate
from gdn2.training.train import TrainingError

TEST_SEED = 1_000_003  # of the questions asked at the end, the same for all models and seeds
VALIDATION_SEED = 2_000_003  # of those that choose between learning rates
WARM_UP = 3  # steps before a graph is recorded: kernels compile, and autograd's buffers come to be


@dataclass(frozen=True)
class TaskRun:
    """How a model is trained on a task and tested.

    Each step draws `batch` sequences of one of `loads`, in turn. Lengths of `optim`'s schedule are in steps here.
    Afterwards `test_sequences` of each of `test_loads` are asked, of `loads` where those are empty.
    """

    loads: tuple[int, ...]
    steps: int = 1_000
    batch: int = 64
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-3, warmup_tokens=50))
    test_loads: tuple[int, ...] = ()
    test_sequences: int = 256
    precision: str = "fp32"

    def __post_init__(self) -> None:
        require(len(self.loads) >= 1, "loads", self.loads, "at least one load")
        for name in ("steps", "batch", "test_sequences"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        require(self.precision in ("fp32", "bf16"), "precision", self.precision, "fp32 or bf16")
        require(self.optim.warmup_tokens < self.steps, "optim.warmup_tokens", self.optim.warmup_tokens,
                f"fewer than the {self.steps} steps")  # fmt: skip


def train_task(
    config: ModelConfig, task: SyntheticTask, run: TaskRun, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """Train a model of `config`, with the task's vocabulary, from `seed`; its accuracy by load.

    Returns plain values: by_load and validation, each a list of {load, accuracy in [0, 1], answers}; loss, the mean of
    every twentieth of training, nats per answer; parameters; memory_floats, the numbers in the recurrent memories of
    all layers.

    ConfigError for settings that do not fit, ValueError for a load that the task does not allow, TrainingError for a
    training that diverges: such a model would answer too, always the first token, and on parity half rightly.
    """
    check_device("device", device)
    where = torch.device(device)
    config = replace(config, vocab_size=task.vocab_size)
    torch.manual_seed(seed)
    model = LanguageModel(config).to(where)
    generator = torch.Generator(where).manual_seed(seed)
    losses = _fit(model, task, run, generator).cpu()
    _check_finite(model, losses)
    model.eval()
    tested = run.test_loads or run.loads
    return {
        "by_load": [_accuracy(model, task, load, run, TEST_SEED) for load in tested],
        "validation": [_accuracy(model, task, load, run, VALIDATION_SEED) for load in run.loads],
        "loss": [float(part.mean()) for part in losses.tensor_split(20) if len(part)],
        "parameters": model.num_parameters(),
        "memory_floats": _memory_floats(model),
    }


def _fit(model: LanguageModel, task: SyntheticTask, run: TaskRun, generator: torch.Generator) -> Tensor:
    """Train; the loss of every step [steps]."""
    device = generator.device
    optimizer = adamw(model, run.optim)
    rates = [learning_rate(run.optim, step, run.steps) for step in range(1, run.steps + 1)]
    schedule = torch.tensor(rates, dtype=torch.float32, device=device)
    losses = torch.zeros(run.steps, device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    rate = torch.zeros((), device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["capturable"] = device.type == "cuda"

    def once(load: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(run, device):
            loss, _ = _ask(model, task.draw(load, run.batch, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip or math.inf)
        rate.copy_(schedule.index_select(0, step)[0])
        optimizer.step()
        losses.index_copy_(0, step, loss.detach()[None].float())
        step.add_(1)

    if device.type != "cuda":
        for number in range(run.steps):
            once(run.loads[number % len(run.loads)])
        return losses
    replays = _record(once, run.loads, generator, lambda: int(step) < run.steps)
    for number in range(int(step), run.steps):
        replays[number % len(run.loads)]()
    return losses


def _check_finite(model: LanguageModel, losses: Tensor) -> None:
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise TrainingError(f"the loss of step {bad[0] + 1} of {len(losses)} was not finite")
    if not all(bool(weights.isfinite().all()) for weights in model.parameters()):
        raise TrainingError("the last step left weights that are not finite")


def _record(
    once: Callable[[int], None], loads: Sequence[int], generator: torch.Generator, more: Callable[[], bool]
) -> list[Callable[[], None]]:
    """A replay of `once` for each load; the steps that warm up count as training, while there are `more`."""
    side = torch.cuda.Stream(generator.device)
    side.wait_stream(torch.cuda.current_stream(generator.device))
    with torch.cuda.stream(side):
        for load in loads:
            for _ in range(WARM_UP):
                if more():
                    once(load)
    torch.cuda.current_stream(generator.device).wait_stream(side)
    replays = []
    for load in loads:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            once(load)
        replays.append(graph.replay)
    return replays


def _ask(model: LanguageModel, questions: Questions) -> tuple[Tensor, Tensor]:
    """Mean loss over the answers, nats, and which of them are right [B, n]."""
    hidden, _ = model(questions.tokens, output_state=False)
    at = questions.positions[:, :, None].expand(-1, -1, hidden.shape[-1])
    logits = model.logits(hidden.gather(1, at))
    loss = F.cross_entropy(logits.flatten(0, 1), questions.answers.flatten())
    return loss, logits.argmax(-1) == questions.answers


@torch.no_grad()
def _accuracy(model: LanguageModel, task: SyntheticTask, load: int, run: TaskRun, seed: int) -> dict[str, Any]:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    right, answers, left = torch.zeros((), device=device), 0, run.test_sequences
    while left > 0:
        questions = task.draw(load, min(run.batch, left), generator)
        with _autocast(run, device):
            right += _ask(model, questions)[1].sum()
        answers += questions.answers.numel()
        left -= run.batch
    return {"load": load, "accuracy": float(right) / answers, "answers": answers}


def _autocast(run: TaskRun, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if run.precision == "bf16" else nullcontext()


def _memory_floats(model: LanguageModel) -> int:
    states = model.initial_state(1)
    return sum(state.memory.numel() for state in states if not isinstance(state, AttentionState))
