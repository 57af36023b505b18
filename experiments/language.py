"""Experiments 2 and 3: language and needles, every mixer with the same memory, parameters and tokens; and Table 5.

    python experiments/language.py --size full --prepare
    python experiments/language.py --size full --device cuda --budget-seconds 540
    python experiments/language.py --size full --device cuda --mixers ablations --kinds recurrent
    python experiments/language.py --size full --summary

A row is one language model, trained on Python sources of this machine with needle and recall documents between them
(`corpus.py`), in a run's folder of its own that `gdn2 report`, `gdn2 eval` and `gdn2 generate` take. Measured are bits
per byte of held-out files, at the training length and at the longest by position, and needles at the training length
and beyond. The grid is seeds x kinds x learning rates x mixers, the mixers innermost: wherever the budget ends it, each
has had the same. Rows that are there are skipped, so that the same command goes on.

A needle counts as found when greedy decoding would begin with the answer: the answer is read behind its prompt, and
each of its tokens has to be the likeliest. RULER asks that the answer be anywhere in 128 new tokens, which is more
lenient; `gdn2 eval RUN --tasks niah_single_1,...` on a run's folder measures that.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import rows
import torch
from corpus import ASKED, FILES, QUESTIONS, Corpus, open_corpus, write_corpus
from rows import Row
from torch.nn.functional import cross_entropy
from variants import MIXERS, chosen

from gdn2.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, build, to_dict
from gdn2.data import Shards
from gdn2.evaluation.language import perplexity
from gdn2.model import LanguageModel
from gdn2.presets import preset
from gdn2.report.experiments import language_entries, language_tables
from gdn2.training import TrainingError, checkpoint, train
from gdn2.training.device import resolve_device
from gdn2.training.metrics import read_metrics

KINDS = {"recurrent": "", "hybrid": "hybrid-"}
ATTENTION = ("transformer", "transformer-full")  # of one kind only, "attention"
USUAL = ("gdn2", "kda", "gdn", "deltanet", "mamba2", "mamba3", "transformer")
READ_AT_ONCE = 65_536  # tokens of needle questions in one forward pass


@dataclass(frozen=True)
class Size:
    """A grid: the text, the models' preset size, what is swept, and how each is trained and tested."""

    corpus: Corpus
    preset: str
    rates: tuple[float, ...]
    seeds: int
    optim: OptimConfig
    train: TrainConfig
    changes: tuple[tuple[str, int], ...] = ()  # of the preset's settings


SIZES = {
    "full": Size(
        corpus=Corpus(
            packages=("torch", "sympy"), text_bytes=48_000_000, val_share=0.03, vocab_size=4_096, row=1_024,
            per_row=(1, 2, 3, 6, 6), needle_share=0.3, recall_share=0.05,
            lengths=(1_024, 2_048, 4_096, 8_192), samples=50,
        ),
        preset="10m",
        rates=(2e-3,),
        seeds=3,
        optim=OptimConfig(warmup_tokens=2_000_000),
        train=TrainConfig(
            tokens=30_000_000, batch_tokens=8_192, micro_batch=8, eval_every=0, eval_tokens=262_144, log_every=50,
            checkpoint_every=0,
        ),
    ),
    "small": Size(
        corpus=Corpus(
            packages=(), text_bytes=300_000, val_share=0.1, vocab_size=512, row=512,
            per_row=(1,), needle_share=0.25, recall_share=0.05, lengths=(512, 1_024, 2_048), samples=3,
        ),
        preset="tiny",
        rates=(4e-3,),
        seeds=1,
        optim=OptimConfig(warmup_tokens=4_096),
        train=TrainConfig(
            tokens=40_960, batch_tokens=1_024, micro_batch=2, eval_every=0, eval_tokens=4_096, checkpoint_every=0
        ),
        changes=(("num_layers", 2),),
    ),
}  # fmt: skip


def grid(size: Size, kinds: list[str], mixers: list[str], corpus: dict[str, Any]) -> Iterator[Row]:
    """The settings of every row, in the order in which they are measured; `corpus` is what corpus.json says."""
    about = {key: value for key, value in corpus.items() if key != "rows"}
    for seed, kind, rate, mixer in product(range(size.seeds), kinds, size.rates, mixers):
        if mixer in ATTENTION and kind != kinds[0]:
            continue
        named = model_of(size, kind, mixer, corpus["settings"]["vocab_size"])
        config = RunConfig(
            model=named,
            data=DataConfig(seq_len=size.corpus.row),
            optim=replace(size.optim, lr=rate),
            train=size.train,
            seed=seed,
        )
        yield {
            "experiment": "language",
            "kind": "attention" if mixer in ATTENTION else kind,
            "mixer": mixer,
            "lr": rate,
            "seed": seed,
            "corpus": about,
            "config": {key: to_dict(config)[key] for key in ("model", "optim", "train")},
        }


def model_of(size: Size, kind: str, mixer: str, vocab_size: int) -> ModelConfig:
    """The preset of the mixer, with the text's vocabulary and what makes a variant of it."""
    options = MIXERS.get(mixer, {})
    base = options.get("mixer", mixer)
    prefix = "" if mixer in ATTENTION else KINDS[kind]
    own = {name: value for name, value in options.items() if name != "mixer"}
    return replace(preset(f"{base}-{prefix}{size.preset}"), vocab_size=vocab_size, **dict(size.changes), **own)


def measure(setting: Row, data: Path, runs: Path, device: str) -> Row:
    """Train the model of a setting, unless its run is there, and test it: the row."""
    key = rows.key_of(setting)
    run = runs / f"{setting['kind']}-{setting['mixer']}-seed{setting['seed']}-{key[:8]}"
    place = {"path": str(data), "seq_len": setting["corpus"]["settings"]["row"]}
    config = build(RunConfig, setting["config"] | {"data": place, "seed": setting["seed"]})
    config = replace(config, train=replace(config.train, device=device))
    began = time.perf_counter()
    if not checkpoint.checkpoints(run):  # checkpoints come at the end alone
        if run.exists():
            shutil.rmtree(run)  # of a training that was cut off
        try:
            with open(os.devnull, "w", encoding="utf-8") as nowhere:  # the run keeps its metrics
                train(config, run, stream=nowhere)
        except TrainingError as error:  # a result too: the grid goes on, and the row says so
            return {"key": key, **setting, "failed": str(error), "seconds": time.perf_counter() - began}
    trained = time.perf_counter()
    where, autocast, precision = resolve_device(config)
    model = LanguageModel.from_checkpoint(run, where)
    val, lengths = Shards(data).split("val"), setting["corpus"]["settings"]["lengths"]
    with autocast:
        language = {
            str(length): asdict(perplexity(model, val, length, config.train.eval_tokens, where))
            for length in (lengths[0], lengths[-1])
        }
        needles = ask_all(model, data, lengths)
    metrics = [row for row in read_metrics(run) if row["kind"] == "train"]
    return {
        "key": key,
        **setting,
        "language": language,
        "needles": needles,
        "loss": [{"tokens": row["tokens"], "bits_per_byte": row["bits_per_byte"]} for row in metrics],
        "tokens_per_second": metrics[-1]["tokens_per_second"],
        "parameters": model.num_parameters(),
        "block_parameters": model.num_block_parameters(),
        "precision": precision,
        "run": run.name,
        "training_seconds": trained - began,
        "seconds": time.perf_counter() - began,
    }


def ask_all(model: LanguageModel, data: Path, lengths: list[int]) -> list[Row]:
    """Each task at each length: found, percent of the answers read off whole; tokens, percent of answers' tokens right;
    nats, mean of an answer's token; by_depth, [found, asked] in each fifth of the haystack."""
    cells = []
    with np.load(data / QUESTIONS) as arrays:
        for task in ASKED:
            for length in lengths:
                name = f"{task}/{length}"
                right, nats = ask(model, arrays[f"{name}/tokens"].astype(np.int64), arrays[f"{name}/spans"])
                found = [bool(row.all()) for row in right]
                fifths = np.minimum(arrays[f"{name}/depths"] / 20, 4).astype(int).tolist()
                by_depth = [[sum(f for f, d in zip(found, fifths) if d == i), fifths.count(i)] for i in range(5)]
                every = torch.cat(right).float()
                cells.append(
                    {
                        "task": task,
                        "length": length,
                        "found": 100 * sum(found) / len(found),
                        "tokens": 100 * float(every.mean()),
                        "nats": float(torch.cat(nats).mean()),
                        "by_depth": by_depth,
                        "samples": len(found),
                    }
                )
    return cells


@torch.inference_mode()
def ask(model: LanguageModel, tokens: np.ndarray, spans: np.ndarray) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each question, which tokens of its answer are the likeliest ones there, and their losses in nats; float32.

    tokens [n, T] int64, spans [n, 2]: where each answer begins and ends. What is behind an answer changes nothing.
    """
    device = next(model.parameters()).device
    right, nats = [], []
    part = max(1, READ_AT_ONCE // tokens.shape[1])
    for start in range(0, len(tokens), part):
        ids = torch.from_numpy(tokens[start : start + part]).to(device)
        hidden, _ = model(ids, output_state=False)
        for row, (first, last) in enumerate(spans[start : start + part].tolist()):
            logits, answer = model.logits(hidden[row, first - 1 : last - 1]), ids[row, first:last]
            right.append(logits.argmax(-1) == answer)
            nats.append(cross_entropy(logits, answer, reduction="none"))
    return [row.cpu() for row in right], [row.float().cpu() for row in nats]


def describe(row: Row) -> str:
    """One line about a row."""
    name = f"{row['kind']} {row['mixer']} lr {row['lr']:g} seed {row['seed']}"
    if "failed" in row:
        return f"{name}: {row['failed']}"
    first, *_, last = row["language"].values()
    found = " ".join(f"{cell['found']:.0f}" for cell in row["needles"])
    bits = f"{first['bits_per_byte']:.4f} and {last['bits_per_byte']:.4f} bits per byte"
    return f"{name}: {bits}, needles {found}, {row['tokens_per_second']:,.0f} tokens/s"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows.add_options(parser, list(SIZES), "language")
    parser.add_argument("--data", type=Path, help="the text's folder; else corpora/language-SIZE")
    parser.add_argument("--runs", type=Path, help="where the runs' folders go; else runs/language-SIZE")
    parser.add_argument("--prepare", action="store_true", help="make the text's folder, and leave")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"some of {', '.join(KINDS)}")
    known = (*MIXERS, *ATTENTION)
    parser.add_argument("--mixers", default=",".join(USUAL), help=f"some of {', '.join(known)}; or ablations")
    parser.add_argument("--rates", help="learning rates, comma-separated; else the size's")
    parser.add_argument("--tokens", type=int, help="of each training; else the size's")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    if options.tokens:
        size = replace(size, train=replace(size.train, tokens=options.tokens))
    if options.rates:
        size = replace(size, rates=rows.numbers(parser, "--rates", options.rates))
    size = replace(size, seeds=options.seeds or size.seeds)
    kinds, mixers = options.kinds.split(","), chosen(options.mixers)
    rows.check_names(parser, kinds, KINDS)
    rows.check_names(parser, mixers, [name for name in known if name != "linear"])
    out = options.out or Path(__file__).parent / "results" / f"language-{options.size}.jsonl"
    if options.summary:
        found = list(rows.read(out).values())
        rows.show(language_tables(language_entries(found)), found)
        return
    data = options.data or Path("corpora", f"language-{options.size}")
    about = text_of(data, size.corpus, may_write=not options.dry_run)
    print(json.dumps({key: value for key, value in about.items() if key != "settings"}), flush=True)
    if options.prepare:
        return
    runs = options.runs or Path("runs", f"language-{options.size}")
    if not options.dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / FILES, out.with_suffix(".files.txt"))
    settings = list(grid(size, kinds, mixers, about))
    measured = rows.work(
        settings, out, options, partial(measure, data=data, runs=runs, device=options.device), describe
    )
    if not options.dry_run:
        rows.show(language_tables(language_entries(measured)), measured)


def text_of(data: Path, corpus: Corpus, may_write: bool) -> dict[str, Any]:
    """What corpus.json of the folder says; the folder is made where it is not there."""
    if not data.exists() and may_write:
        began = time.perf_counter()
        print(f"preparing {data}", flush=True)
        write_corpus(data, corpus)
        print(f"prepared in {time.perf_counter() - began:.0f} s", flush=True)
    return open_corpus(data, corpus)


if __name__ == "__main__":
    main()
