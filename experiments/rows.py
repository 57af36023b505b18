"""Rows of experiments: one JSON object a line, appended as soon as it is measured, found again by what it asked for."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

import gdn2

Row = dict[str, Any]


def key_of(setting: Row) -> str:
    """A short hash of everything that a row's numbers depend on, besides code and machine."""
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, Row]:
    """The rows of a file by key; a last line cut off by a crash is left out. ValueError for any other line."""
    rows: dict[str, Row] = {}
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            rows[row["key"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no row of an experiment: {error}") from error
    return rows


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_bytes().endswith(b"\n"):  # half a line of a run that died
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rfind(b"\n") + 1])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def code() -> Row:
    """Which code measures: the version, git's commit where there is one, and a hash of the sources as they are."""
    source = Path(gdn2.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        digest.update(str(path.relative_to(source)).encode() + path.read_bytes())
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=False)
    commit = git.stdout.strip() if git.returncode == 0 else None
    return {"version": gdn2.__version__, "commit": commit, "source_sha256": digest.hexdigest()}


def machine(device: str) -> Row:
    """Where it is measured."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__}
