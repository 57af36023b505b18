"""What `gdn2 selftest` found on this GPU, kept on disk: configurations that are refused, and measured ones.

One JSON file in the user's cache folder, with an entry for each combination of GPU, torch, Triton and source text of
the kernels; another combination has nothing to say. `GDN2_CACHE` names another folder.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from gdn2.ops.kernels.tables import Config

AROUND = "the layer's convolutions and norms"
DECODE = "the layer's decoding step"
_ignored = False

_log = logging.getLogger("gdn2")


@dataclass
class Verdict:
    """By name of a configuration: what is wrong with it, and the one that replaces it."""

    checked: bool = False
    wrong: dict[str, str] = field(default_factory=dict)
    tuned: dict[str, Config] = field(default_factory=dict)


def path() -> Path:
    """The file. `GDN2_CACHE`, `XDG_CACHE_HOME` and the home folder decide where it is; OSError when there is none."""
    folder = os.environ.get("GDN2_CACHE")
    if folder:
        return Path(folder) / "kernels.json"
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder; GDN2_CACHE may name one instead") from None
    return base / "gdn2" / "kernels.json"


def load(device: torch.device) -> Verdict:
    """The verdict for this device; an empty one if there is none. ValueError when the file cannot be understood."""
    entry = _read().get(_key(device), {})
    try:
        tuned = {name: Config.of(values) for name, values in entry.get("tuned", {}).items()}
        return Verdict(bool(entry.get("checked")), dict(entry.get("wrong", {})), tuned)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path()} is not from `gdn2 selftest` ({error}); delete it and run that again") from None


def update(device: torch.device, change: Callable[[Verdict], Verdict]) -> None:
    """Make of the verdict for this device what `change` makes of it. Those of others stay.

    Processes that do so at the same time take turns, and one that only reads sees the file before or after.
    """
    import fcntl  # not at the top: who only reads needs no lock

    path().parent.mkdir(parents=True, exist_ok=True)
    with open(path().with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = _read() | {_key(device): asdict(change(load(device)))}
        temporary = path().with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(entries, indent=1))
        temporary.replace(path())
    for cache in caches:
        cache.cache_clear()


@contextmanager
def ignoring() -> Iterator[None]:
    """Within this context nothing is refused and nothing tuned is used: for the self-test itself."""
    global _ignored
    before, _ignored = _ignored, True
    try:
        yield
    finally:
        _ignored = before


def demand(name: str, device: torch.device) -> Verdict:
    """The verdict for this device. ValueError when it says that the configuration or kernel of this name is wrong."""
    verdict = Verdict() if _ignored else _remembered(device)
    if name in verdict.wrong:
        raise ValueError(
            f"the Triton kernels for {name!r} are wrong on this GPU, `gdn2 selftest` found ({verdict.wrong[name]}); "
            f"use backend='torch', or another version of Triton and `gdn2 selftest` again. It is noted in {path()}"
        )
    return verdict


@lru_cache(maxsize=16)
def _remembered(device: torch.device) -> Verdict:
    try:
        return load(device)
    except OSError as error:  # a user without a home folder, or with somebody else's
        _log.warning("what `gdn2 selftest` found is not known: %s", error)
        return Verdict()


caches: list[Any] = [_remembered]  # what was made of verdicts, forgotten when one changes


def _read() -> dict[str, Any]:
    if not path().exists():
        return {}
    try:
        entries = json.loads(path().read_text())
    except (ValueError, RecursionError) as error:  # nor any text
        raise ValueError(f"{path()} is not JSON ({error}); delete it and run `gdn2 selftest` again") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path()} holds no JSON object; delete it and run `gdn2 selftest` again")
    return entries


def _key(device: torch.device) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{gpu}, torch {torch.__version__}, Triton {triton.__version__}, kernels {_kernels()}"


@lru_cache(maxsize=1)
def _kernels() -> str:
    """A fingerprint of the kernels' source text."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
