"""What a row of an experiment has to hold for its tables and pictures."""

from typing import Any

from gdn2.evaluation.fields import LIST, NUMBER, NUMBER_OR_NULL, TEXT, Kinds, check_fields

KINDS = ("recurrent", "hybrid", "attention")  # of language models

EVERY: dict[str, Kinds] = {"key": TEXT, "mixer": TEXT, "lr": NUMBER, "seed": NUMBER}
SETTINGS: dict[str, dict[str, Kinds]] = {
    "memory": {
        "task": TEXT,
        "memory.+": NUMBER,
        "run.steps": NUMBER,
        "run.batch": NUMBER,
        "run.optim.warmup_tokens": NUMBER,
        "run.precision": TEXT,
    },
    "language": {"kind": TEXT, "corpus.train_sha256": TEXT, "config.train.tokens": NUMBER},
}
MEASURED: dict[str, dict[str, Kinds]] = {
    "memory": {"validation.+.accuracy": NUMBER, "by_load.+.load": NUMBER, "by_load.+.accuracy": NUMBER},
    "language": {
        "parameters": NUMBER,
        "language.+.bits_per_byte": NUMBER,
        "needles.+.task": TEXT,
        "needles.*.length": NUMBER,
        "needles.*.found": NUMBER,
        "needles.*.samples": NUMBER,
        "needles.*.by_depth": LIST,
        "needles.*.by_depth.*.+": NUMBER,
        "loss.*.tokens": NUMBER,
        "loss.*.bits_per_byte": NUMBER_OR_NULL,
    },
}
FAILED: dict[str, Kinds] = {"failed": TEXT}  # in place of what would have been measured


def check_row(row: Any) -> None:
    """ValueError for a row of no known experiment, and for a field that is missing or of another kind."""
    check_fields(row, {"experiment": TEXT})
    experiment = row["experiment"]
    if experiment not in SETTINGS:
        raise ValueError(f"experiment is {experiment!r}; expected one of {', '.join(SETTINGS)}")
    check_fields(row, EVERY | SETTINGS[experiment] | (FAILED if "failed" in row else MEASURED[experiment]))
    if row.get("kind", KINDS[0]) not in KINDS:
        raise ValueError(f"kind is {row['kind']!r}; expected one of {', '.join(KINDS)}")
