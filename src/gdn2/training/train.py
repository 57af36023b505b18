"""The training loop: one function; what it needs is in the files beside it."""

import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

import gdn2
from gdn2.config import RunConfig, require, write_config
from gdn2.data import Shards, TokenBatches, TokenFile, Tokenizer, load_tokenizer
from gdn2.data.disk import writing
from gdn2.data.lock import FolderLock
from gdn2.generate import generate
from gdn2.info import describe
from gdn2.model import LanguageModel
from gdn2.training import checkpoint
from gdn2.training.compiling import compile_blocks
from gdn2.training.device import resolve_device
from gdn2.training.distributed import RankLostError, Ranks, process_count
from gdn2.training.logs import Log, check_logs, open_logs
from gdn2.training.metrics import Display, MetricsFile, Row, inspect, language_scores, validate
from gdn2.training.opening import open_run
from gdn2.training.optim import build_optimizer, learning_rate
from gdn2.training.parallel import check_parallel, parallelize
from gdn2.training.recompute import recompute
from gdn2.training.saver import Saver
from gdn2.training.sharding import clip_gradients, local, settle
from gdn2.training.step import accumulate_gradients
from gdn2.training.stopping import Stopped, StopSignals
from gdn2.training.throughput import mfu, peak_flops
from gdn2.training.watch import Watch, peak_memory

PROMPT_TOKENS = 64  # of the first validation document, continued by each sample


class TrainingError(RuntimeError):
    """Training cannot go on: its numbers have stopped being finite, or another process of the run is gone."""


class Outcome(NamedTuple):
    """How a run ended; `interrupted` names the signal that stopped it, `val` is the last validation's row.

    Stopped before its first row it has written nothing; `step` and `tokens` are those it would have begun with, or 0.
    """

    step: int
    tokens: int
    interrupted: str | None
    val: Row | None


@dataclass
class Counters:
    """Everything the loop counts; saved in each checkpoint, so that a resumed run reports the same numbers."""

    step: int = 0
    bad_steps: int = 0
    bad_in_row: int = 0
    elapsed: float = 0.0  # seconds of the whole run
    nats: float = 0.0  # this and what follows: sums since the last training row
    targets: int = 0
    text_bytes: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


def train(
    config: RunConfig,
    run_dir: str | Path,
    resume: bool = False,
    stream: IO[str] | None = None,
    stop: StopSignals | None = None,
) -> Outcome:
    """Train as `config` says, in the folder `run_dir`; with `resume`, go on from its newest checkpoint.

    Under `torchrun` its processes share the work as `config.parallel` says; each calls this.

    SIGINT (Ctrl-C) and SIGTERM, to any process, end it after the current step with a checkpoint, and before the first
    step with nothing written; a second one ends it at once. `stop` is there already where the caller has watched for
    them since before this call. On a CPU a resumed run of one process is bit-identical to one that never stopped.
    Progress goes to `stream` (standard output). No checkpoint is written while steps are not finite, so that the kept
    ones are good.

    ConfigError and ValueError for a configuration, data or folder that cannot be used, or in which another process is
    training, before anything is written; of several processes RankRefusedError where that is so for another one;
    CheckpointError for a damaged or unwritable checkpoint; OSError, with a note of the newest checkpoint, for another
    file that cannot be written; TrainingError when `train.max_bad_steps` steps in a row
    had a loss or gradient that is not finite (such steps are skipped and counted, the weights stay as they were), or
    when what would be saved is not finite, or when another process of the run is gone.
    """
    run_dir = Path(run_dir)
    check_parallel(config, process_count())
    try:
        with (
            StopSignals() if stop is None else nullcontext(stop) as signals,
            Ranks(config, signals) as ranks,
            FolderLock(run_dir) if ranks.main else nullcontext() as lock,
        ):
            return run(config, run_dir, resume, stream, signals, ranks, None if lock is None else lock.left_by)
    except RankLostError as error:
        raise TrainingError(f"{error}; {newest(run_dir)}; go on with: gdn2 train --run {run_dir} --resume") from error
    except OSError as error:
        error.add_note(newest(run_dir))
        raise


def run(
    config: RunConfig,
    run_dir: Path,
    resume: bool,
    stream: IO[str] | None,
    stop: StopSignals,
    ranks: Ranks,
    left_by: str | None,
) -> Outcome:
    """`train` as one of `ranks`, which it starts; `left_by` is a process that died while it trained in the folder."""
    optim = config.optim
    device, autocast, precision = resolve_device(ranks.on_own_device(config))
    check_logs(config)
    start: Path | None = None
    trainer: dict[str, Any] = {}
    with suppress(Stopped), stop.raising():
        shards = Shards(config.data.path)
        if ranks.local_rank == 0:  # once a machine
            shards.verify()
        tokenizer = load_tokenizer(shards.path)
        check_vocabulary(config, shards)
        source = {"train_sha256": shards.meta.digest("train"), "precision": precision}
        cut = (config.data.seq_len, ranks.micro_batch, config.seed, ranks.data_rank, ranks.data_size)
        batches = TokenBatches(shards.split("train"), *cut, packed=config.data.packed)
        val_batches = TokenBatches(shards.split("val"), *cut, packed=config.data.packed)
        start, trainer = open_run(config, run_dir, resume, source, contents=ranks.local_rank == 0)
    # A rank that a signal has reached meets the others too, to tell them. That all have looked at the folder when they
    # hear of it, or of none, comes before one writes to it.
    ranks.start(device)
    if (received := ranks.any_signal(stop.received)) is not None:
        return stopped_early(received, trainer, stream, ranks)

    counters = Counters()
    metrics = MetricsFile(run_dir / "metrics.jsonl")
    with suppress(Stopped), stop.raising() if ranks.size == 1 else nullcontext():  # of several, all must take part
        torch.manual_seed(config.seed)
        model = LanguageModel(config.model)
        parallelize(model, ranks, device, precision)
        optimizer = build_optimizer(model, optim)
        saver = Saver(run_dir, config, tokenizer, ranks)
        if start is not None:
            saver.load(start, model, optimizer)
            counters = Counters(**trainer["counters"])
            batches.load_state_dict(trainer["data"])
            checkpoint.set_random_state(trainer["random"])
    if (received := ranks.any_signal(stop.received)) is not None:
        return stopped_early(received, trainer, stream, ranks)
    if ranks.main:
        if start is not None:
            metrics.cut_after(counters.step)
        with writing(run_dir / "config.yaml", run_dir / ".config.yaml"):
            write_config(run_dir, config)
    recompute(model, config.train.recompute)
    if config.train.compile:
        compile_blocks(model)
    model.train()

    saved_step, last_val = counters.step if start else None, None
    before, began = counters.elapsed, time.perf_counter()
    display = Display(config.steps, counters.step, stream) if ranks.main else None
    more_logs: AbstractContextManager[list[Log]] = nullcontext([])
    if ranks.main:
        more_logs = open_logs(config, run_dir, counters.step)
    watch, flops = Watch(config.model.vocab_size), describe(config.model, config.data.seq_len).training_flops
    peak = config.train.peak_flops or peak_flops(device)
    with more_logs as logs, display or nullcontext():

        def record(kind: str, **values: Any) -> Row:
            counters.elapsed = before + time.perf_counter() - began
            place = {"step": counters.step, "tokens": counters.step * config.train.batch_tokens}
            row = {"kind": kind, **place, "elapsed": counters.elapsed, **values}
            if display is not None:
                metrics.append(row)
                display.show(row)
                for log in logs:
                    log.append(row)
            return row

        def save() -> None:
            broken = next((name for name, p in model.named_parameters() if not local(p).isfinite().all()), None)
            if ranks.any(broken is not None):
                where = "on another rank" if broken is None else broken
                raise TrainingError(diverged(run_dir, counters.step, f"parameter {where} is not finite"))
            values = source | {
                "step": counters.step,
                "tokens": counters.step * config.train.batch_tokens,
                "counters": asdict(counters),
                "data": batches.state_dict(),
                "random": checkpoint.random_state(),
                "versions": {"gdn2": gdn2.__version__, "torch": torch.__version__},
            }
            saver.save(counters.step, model, optimizer, values)

        verb = "resumed" if start else "started"
        about = f"{model.num_parameters():,} parameters on {device.type}, {precision}{ranks.describe()}"
        record("event", event=f"{verb}: {about}")
        if left_by is not None:
            record("event", event=f"before, {left_by} trained here and died")
        received = None
        while counters.step < config.steps and (received := ranks.any_signal(stop.received)) is None:
            step_began = time.perf_counter()
            step_tokens = (counters.step + 1) * config.train.batch_tokens
            lr = learning_rate(optim, step_tokens, config.steps * config.train.batch_tokens)
            micro_batches = [next(batches) for _ in range(ranks.sequences // ranks.micro_batch)]
            nats, targets, text_bytes = accumulate_gradients(
                model, micro_batches, batches.token_file, ranks, device, autocast
            )
            norm = clip_gradients(model, optim.clip or math.inf, ranks)
            finite = math.isfinite(nats) and math.isfinite(norm)
            if finite:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            optimizer.zero_grad()
            counters.step += 1
            counters.seconds += time.perf_counter() - step_began
            counters.tokens += config.train.batch_tokens
            last = counters.step == config.steps

            if finite:
                counters.bad_in_row = 0
                counters.nats += nats
                counters.targets += targets
                counters.text_bytes += text_bytes
                for warning in watch.step(counters.step, nats / max(targets, 1), norm):
                    record("event", event=warning)
            else:
                counters.bad_steps += 1
                counters.bad_in_row += 1
                what = f"loss {nats / max(targets, 1)}, gradient norm {norm}"
                record("event", event=f"step skipped, not finite: {what} ({counters.bad_steps} so far)")
                if counters.bad_in_row >= config.train.max_bad_steps:
                    why = f"{counters.bad_in_row} steps in a row were not finite (the last: {what})"
                    raise TrainingError(diverged(run_dir, counters.step, why))
            if counters.targets and (counters.step % config.train.log_every == 0 or last):
                scores = language_scores(counters.nats, counters.targets, counters.text_bytes)
                speed = counters.tokens / counters.seconds
                record(
                    "train", **scores, lr=lr, grad_norm=norm, tokens_per_second=speed,
                    mfu=mfu(speed / ranks.size, flops, peak), memory=peak_memory(device), bad_steps=counters.bad_steps,
                )  # fmt: skip
                counters.nats = counters.text_bytes = counters.seconds = 0.0
                counters.targets = counters.tokens = 0
            if due(counters.step, config.train.watch_every):
                layers = inspect(model, val_batches, device, autocast, ranks)
                if layers:
                    record("layers", layers=layers)
                for warning in watch.layers(counters.step, layers):
                    record("event", event=warning)
            if last or due(counters.step, config.train.eval_every):
                scores = validate(model, val_batches, config.train.eval_tokens, device, autocast, ranks)
                last_val = record("val", **scores)
                if last and not math.isfinite(last_val["loss"]):
                    raise TrainingError(diverged(run_dir, counters.step, f"validation loss {last_val['loss']}"))
            if due(counters.step, config.train.sample_every):
                record("sample", **sample(model, val_batches.token_file, tokenizer, config))
                settle(model, ranks)
            # Within a streak of bad steps the weights may be their cause, and a checkpoint would push out a good one.
            if last or (counters.bad_in_row == 0 and due(counters.step, config.train.checkpoint_every)):
                save()
                saved_step = counters.step
            if display is not None:
                display.advance(counters.step)

        if counters.step < config.steps:
            sound = counters.bad_in_row == 0
            if sound and saved_step != counters.step:
                save()
            how = "saved" if sound else f"not saved, the last step was not finite; {newest(run_dir)}"
            record("event", event=f"stopped by {received}, {how}; go on with: gdn2 train --run {run_dir} --resume")
        else:
            record("event", event=f"finished: {run_dir}")
        saver.wait()
    interrupted = received if counters.step < config.steps else None
    return Outcome(counters.step, counters.step * config.train.batch_tokens, interrupted, last_val)


def stopped_early(received: str, trainer: dict[str, Any], stream: IO[str] | None, ranks: Ranks) -> Outcome:
    """The end of a run that a signal reached before anything was written."""
    if ranks.main:
        said = f"stopped by {received} before training began; nothing was written, the same command starts it again"
        print(said, file=stream or sys.stdout, flush=True)
    return Outcome(trainer.get("step", 0), trainer.get("tokens", 0), received, None)


def check_vocabulary(config: RunConfig, shards: Shards) -> None:
    require(
        config.model.vocab_size >= shards.meta.vocab_size,
        "model.vocab_size", config.model.vocab_size,
        f"at least the {shards.meta.vocab_size} of the data's tokenizer {shards.meta.tokenizer!r}",
    )  # fmt: skip


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def sample(model: LanguageModel, token_file: TokenFile, tokenizer: Tokenizer, config: RunConfig) -> Row:
    """A continuation of the start of the first validation document, drawn with the run's seed."""
    prompt = [int(t) for t in token_file.tokens[: min(PROMPT_TOKENS, int(token_file.offsets[1]) - 1)]]
    stop = (tokenizer.end_of_text,)
    steps = generate(model, [prompt], config.train.sample_tokens, temperature=0.8, seed=config.seed, stop_tokens=stop)
    ids = [token for (token,) in steps if token is not None]
    return {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(ids)}


def diverged(run_dir: Path, step: int, why: str) -> str:
    return f"stopped at step {step}: {why}; {newest(run_dir)}. A lower optim.lr or longer optim.warmup_tokens may help"


def newest(run_dir: Path) -> str:
    saved = checkpoint.checkpoints(run_dir)
    return f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was written"
