import json
from dataclasses import replace

import pytest
from saved_run import save_run
from small import small_model

from gdn2.config import write_config


@pytest.fixture
def make_run(tmp_path):
    """A run's folder with a checkpoint, metrics and, where given, results of evaluation."""

    def make(name, results=None, seed=0, bits=2.0, **changes):
        folder = tmp_path / "runs" / name
        config = replace(save_run(folder, small_model(seed, **changes)), seed=seed)
        write_config(folder, config)
        layer = {"mean_erase": 0.5, "mean_write": 0.25, "mean_decay": 0.9, "saturated_erase": 0.0}
        layer |= {"saturated_write": 0.125, "state_rms": 0.0625}
        row = {"step": 1, "elapsed": 1.0, "tokens_per_second": 1000.0, "lr": 1e-3}
        rows = [row | {"kind": "train", "tokens": n, "loss": 5.0, "bits_per_byte": 1 + 9 / n} for n in (10, 20, 30, 40)]
        rows[1] |= {"loss": None, "bits_per_byte": None}  # not finite
        rows.append(row | {"kind": "val", "tokens": 40, "loss": 2.5, "bits_per_byte": bits, "layers": [layer, layer]})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        if results:
            (folder / "eval.json").write_text(json.dumps(results))
        return folder

    return make


@pytest.fixture
def experiments(tmp_path):
    """A folder with rows of both experiments: two mixers, two seeds, two learning rates."""
    folder = tmp_path / "results"
    folder.mkdir()
    memory, language = [], []
    for seed in (0, 1):
        for mixer in ("gdn2", "kda"):
            for lr in (1e-3, 1e-2):
                key = f"{mixer} {seed} {lr}"
                memory.append(memory_row(key, mixer, lr, seed))
                language.append(language_row(key, mixer, lr, seed))
    for name, rows in (("memory", memory), ("language", language)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def memory_row(key, mixer, lr, seed):
    entry = lambda load, accuracy: {"load": load, "accuracy": accuracy}  # noqa: E731
    good = 0.9 if lr == 1e-2 else 0.4
    return {
        "experiment": "memory", "key": key, "task": "mqar", "memory": [1, 16, 16], "mixer": mixer, "lr": lr,
        "seed": seed, "run": {"steps": 2_000, "batch": 64, "optim": {"warmup_tokens": 100}, "precision": "fp32"},
        "parameters": 7, "validation": [entry(4, good)],
        "by_load": [entry(4, good - 0.2 * seed), entry(8, 0.25)],
    }  # fmt: skip


def language_row(key, mixer, lr, seed):
    bits = (1.5 if mixer == "gdn2" else 1.7) + 0.2 * seed + (lr == 1e-2)
    cells = [
        {"task": task, "length": length, "found": 40.0, "samples": 10,
         "by_depth": [[1, 2], [0, 2], [2, 2], [1, 4], [0, 0]]}
        for task in ("niah_single_1", "niah_multikey_1") for length in (512, 1_024)
    ]  # fmt: skip
    return {
        "experiment": "language", "key": key, "kind": "recurrent", "mixer": mixer, "lr": lr, "seed": seed,
        "parameters": 12_000_000, "corpus": {"train_sha256": "0123456789"}, "config": {"train": {"tokens": 1_000}},
        "language": {"512": {"bits_per_byte": bits}, "1024": {"bits_per_byte": bits + 0.1}}, "needles": cells,
        "loss": [{"tokens": n, "bits_per_byte": 1 + 1 / n} for n in (250, 500, 750, 1_000)],
    }  # fmt: skip
