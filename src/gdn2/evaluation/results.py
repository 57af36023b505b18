"""The results of `gdn2 eval` in a run's eval.json, each under a name that says all that makes another measurement.

The checkpoint is not part of the name: the same measurement of a newer one takes the older's place.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdn2.evaluation.fields import LIST, NUMBER, NUMBER_OR_NULL, TEXT, Kinds, check_fields
from gdn2.evaluation.needles import NEEDLE_TASKS
from gdn2.evaluation.passages import PASSAGE_TASKS

HARNESS = "lm_eval:"  # before the name of a task of lm-evaluation-harness; `integrations/lm_eval.py` runs those
Result = dict[str, Any]

EVERY: dict[str, Kinds] = {"task": TEXT, "checkpoint": TEXT, "settings": LIST, "settings.*": TEXT, "weights": TEXT}
ASKED: dict[str, Kinds] = {"percent": NUMBER, "samples": NUMBER, "seed": NUMBER}
PERPLEXITY: dict[str, Kinds] = {
    "perplexity": NUMBER,
    "bits_per_byte": NUMBER_OR_NULL,
    "length": NUMBER,
    "tokens": NUMBER,
    "packed": (bool,),
    "data_sha256": TEXT,
}
NEEDLES: dict[str, Kinds] = ASKED | {
    "lengths.+": NUMBER,
    "percent_by_length.+": NUMBER,
    "depths": LIST,
    "depths.*": NUMBER,
    "grid.+.+": NUMBER,
    "haystack": TEXT,
}
PASSAGES: dict[str, Kinds] = {"percent": NUMBER, "samples": NUMBER, "length": NUMBER, "data_sha256": TEXT}
OF_HARNESS: dict[str, Kinds] = {"max_length": NUMBER}


def fields_of(task: Any) -> dict[str, Kinds]:
    """What a result of the task has to hold, besides EVERY. ValueError for a task that there is not."""
    if task == "perplexity":
        return PERPLEXITY
    if task == "recall":
        return ASKED
    if task in PASSAGE_TASKS:
        return PASSAGES
    if task in NEEDLE_TASKS:
        return NEEDLES
    if str(task).startswith(HARNESS):
        return OF_HARNESS
    raise ValueError(f"field 'task' is {task!r}; expected a task of gdn2 eval")


def name_of(result: Result) -> str:
    """What a result is called: its task, at which length, and under which conditions."""
    return f"{result['task']}{place(result)}{conditions(result)}"


def place(result: Result) -> str:
    """The length that a result is of, as it stands in names; nothing for a task without."""
    if result["task"] == "perplexity":
        return f", windows of {result['length']:,}"
    if "lengths" in result:
        return f" at {'/'.join(f'{length:,}' for length in result['lengths'])}"
    if "length" in result:
        return f" at {result['length']:,}"
    return f", texts of at most {result['max_length']:,}" if "max_length" in result else ""


def conditions(result: Result) -> str:
    """All else that two results which cannot be compared differ in; the usual seed and weights are not mentioned."""
    said = []
    if result["task"] == "perplexity":
        said.append(f"{result['tokens']:,} tokens")
        said += ["documents apart"] if result["packed"] else []
        said.append(f"text {result['data_sha256'][:8]}")
    elif "samples" in result:
        said.append(f"{result['samples']:,} questions")
        said += [f"seed {result['seed']}"] if result.get("seed") else []
        said += [f"depths {'/'.join(f'{depth:g}' for depth in result['depths'])} %"] if result.get("depths") else []
        said += [f"{result['haystack']} {result['haystack_sha256'][:8]}"] if "haystack_sha256" in result else []
        said += [f"text {result['data_sha256'][:8]}"] if "data_sha256" in result else []
    said += [f"tasks of {result['task_path']}"] if result.get("task_path") else []
    said += [result["weights"]] if result["weights"] != "float32" else []
    said += sorted(result["settings"])
    return f"; {', '.join(said)}" if said else ""


def read(path: Path) -> dict[str, Result]:
    """The results in an eval.json by name, oldest first, or none where there is no file.

    ValueError for a file that is not one, or a result that lacks a field.
    """
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); move it away to evaluate anew") from error
    if not isinstance(results, dict) or not all(isinstance(result, dict) for result in results.values()):
        raise ValueError(f"{str(path)!r} holds no results by name; move it away to evaluate anew")
    for name, result in results.items():
        try:
            check_fields(result, EVERY)
            check_fields(result, fields_of(result["task"]))
        except ValueError as error:
            raise ValueError(f"{str(path)!r}, result {name!r}: {error}; move it away to evaluate anew") from error
    return results


def put(results: dict[str, Result], result: Result) -> None:
    """Add a result as the newest, in place of the same measurement's older one."""
    results.pop(name_of(result), None)
    results[name_of(result)] = result


def write(path: Path, results: Mapping[str, Result]) -> None:
    """Replace the file at once: a reader, or a crash, meets the old or the new one whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
