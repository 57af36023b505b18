"""Token shards on disk, memory-mapped, and batches cut from them in a resumable order."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

VERSION = 1
SPLITS = ("train", "val")
DTYPES = {"uint16": "<u2", "uint32": "<u4"}  # little-endian on disk, whatever the machine
IGNORE = -100  # a target that no loss counts


@dataclass(frozen=True)
class SplitMeta:
    """Counts of one split; `bytes` is its text in UTF-8, `tokens` counts the end-of-text tokens too."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Meta:
    """meta.json: all that is known of a folder of shards."""

    version: int
    tokenizer: str
    vocab_size: int
    end_of_text: int
    dtype: str
    seed: int
    val_share: float
    train: SplitMeta
    val: SplitMeta
    empty_documents: int
    sources: list[str]
    skipped: list[str]
    sha256: dict[str, str]
    shard_tokens: int | None = None  # tokens of each of a split's files but the last; None for one file

    def files(self, split: str) -> list[str]:
        """Names of the files with a split's tokens."""
        return file_names(split, getattr(self, split).tokens, self.shard_tokens)

    def digest(self, split: str) -> str:
        """A checksum of a split's tokens: the file's own SHA-256, or one of the list of them."""
        sums = [self.sha256[name] for name in self.files(split)]
        return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        (folder / "meta.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def file_names(split: str, tokens: int, shard_tokens: int | None) -> list[str]:
    """The files that `tokens` tokens of a split lie in."""
    if shard_tokens is None or tokens <= shard_tokens:
        return [f"{split}.bin"]
    return [f"{split}-{i:05d}.bin" for i in range(-(-tokens // shard_tokens))]


class JoinedTokens:
    """Arrays end to end, all but the last of `size` tokens, sliced like one; a slice over several is a copy."""

    def __init__(self, arrays: Sequence[np.ndarray], size: int) -> None:
        self._arrays, self._size = arrays, size

    def __len__(self) -> int:
        return self._size * (len(self._arrays) - 1) + len(self._arrays[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"slice {place} of tokens; expected steps of 1")
        parts = []
        for i in range(start // self._size, -(-stop // self._size)):
            first = i * self._size
            parts.append(self._arrays[i][max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [self._arrays[0][:0]])


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class TokenFile:
    """One split. `tokens` [n], of one or several files, are memory-mapped uint16 or uint32, to be sliced; document i is
    tokens[offsets[i]:offsets[i + 1]]. `path` is the first file."""

    path: Path
    tokens: np.ndarray | JoinedTokens
    offsets: np.ndarray
    meta: Meta
    counts: SplitMeta

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sha256(self) -> str:
        """Of the checksums of the split's files: its tokens, and where documents begin."""
        split = next(name for name in SPLITS if self.path.name.startswith(name))
        sums = sorted(item for item in self.meta.sha256.items() if item[0].startswith(split))
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    def bytes_of(self, targets: Tensor) -> float:
        """Bytes of text that `targets` stand for, those of -100 left out: exact for bytes, else the split's mean."""
        if self.meta.tokenizer == "bytes":
            return float(((targets >= 0) & (targets < 256)).sum())
        return float((targets >= 0).sum()) * self.counts.bytes / self.counts.tokens


class Shards:
    """A folder written by `prepare`. Opening checks the version, that every file is there, and every size."""

    def __init__(self, path: str | Path) -> None:
        """ValueError for a folder that is missing, of another version, or whose files do not fit its meta.json."""
        self.path = Path(path)
        meta_path = self.path / "meta.json"
        if not meta_path.is_file():
            raise ValueError(f"{str(path)!r} is no folder of token shards (no meta.json); `gdn2 prepare` writes one")
        try:
            values = json.loads(meta_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(meta_path)!r} is not JSON: {error}") from error
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise ValueError(f"{str(path)!r} has shard format version {version!r}; this gdn2 reads version {VERSION}")
        try:
            self.meta = Meta(**values | {split: SplitMeta(**values[split]) for split in SPLITS})
            self._dtype = np.dtype(DTYPES[self.meta.dtype])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{str(meta_path)!r} is incomplete or altered: {error}") from error
        self._splits = {name: self._open(name) for name in SPLITS}

    def split(self, name: str) -> TokenFile:
        if name not in self._splits:
            raise ValueError(f"split {name!r}; expected one of {', '.join(SPLITS)}")
        return self._splits[name]

    def verify(self, *splits: str) -> None:
        """Read every byte of `splits` (of all when none is named) and compare it with the checksums of meta.json.

        ValueError names the file that differs.
        """
        for name, expected in self.meta.sha256.items():
            if name.startswith(splits or SPLITS) and sha256_of(self.path / name) != expected:
                raise ValueError(
                    f"{str(self.path / name)!r} does not match its checksum in meta.json; prepare it again"
                )

    def _open(self, split: str) -> TokenFile:
        counts: SplitMeta = getattr(self.meta, split)
        paths = [self.path / name for name in self.meta.files(split)]
        each = counts.tokens if len(paths) == 1 else self.meta.shard_tokens or counts.tokens
        for i, path in enumerate(paths):
            self._check_size(path, min(each, counts.tokens - i * each) * self._dtype.itemsize)
        index = self.path / f"{split}.idx.npy"
        if not index.is_file():
            raise ValueError(f"{str(index)!r} is missing; prepare it again")
        try:
            offsets = np.lib.format.open_memmap(index, mode="r")
        except ValueError as error:
            raise ValueError(f"{str(index)!r} is truncated or no array: {error}") from error
        if offsets.shape != (counts.documents + 1,) or offsets[-1] != counts.tokens:
            raise ValueError(f"{str(index)!r} does not fit meta.json; prepare it again")
        arrays = [np.memmap(path, self._dtype, "r") for path in paths]
        tokens = arrays[0] if len(arrays) == 1 else JoinedTokens(arrays, each)
        return TokenFile(paths[0], tokens, offsets, self.meta, counts)

    def _check_size(self, path: Path, expected: int) -> None:
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is missing; prepare it again")
        if path.stat().st_size != expected:
            raise ValueError(
                f"{str(path)!r} has {path.stat().st_size} bytes, meta.json says {expected}; "
                "it is truncated or altered, prepare it again"
            )


class Batch(NamedTuple):
    """tokens, targets int64, both [B, T], or [1, B * T] when packed; cu_seqlens int64 [N + 1] only when packed."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """On `device`; a GPU copies from pinned memory while the host goes on."""

        def moved(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

        cu_seqlens = None if self.cu_seqlens is None else moved(self.cu_seqlens)
        return Batch(moved(self.tokens), moved(self.targets), cu_seqlens)


class TokenBatches:
    """An endless iterator of batches: every window once per epoch, in a fresh seeded order each epoch.

    Window i holds tokens[i * seq_len : (i + 1) * seq_len] and the same span moved on by one as its targets. Each step
    takes the next `batch * world_size` windows of the order and `rank` keeps its own `batch` of them, so the order is
    the same for every world size. An epoch may end inside a batch: nothing is dropped.

    Packed, the windows of a batch lie end to end in one row, `cu_seqlens` marks each window and each document inside
    it, and a document's last position has no target (it would be the first token of an unrelated document).
    """

    def __init__(
        self,
        token_file: TokenFile,
        seq_len: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        packed: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; expected 0 <= rank < world_size ({world_size})")
        self.windows = (len(token_file) - 1) // seq_len
        if self.windows < 1:
            raise ValueError(
                f"{str(token_file.path)!r} has {len(token_file)} tokens; one window of seq_len {seq_len} needs "
                f"{seq_len + 1}: prepare more text or lower seq_len"
            )
        self.token_file, self.seq_len, self.batch, self.seed = token_file, seq_len, batch, seed
        self.rank, self.world_size, self.packed = rank, world_size, packed
        self._taken = 0  # windows of the order taken by all ranks together
        self._order: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> "TokenBatches":
        return self

    def __next__(self) -> Batch:
        first = self._taken + self.rank * self.batch
        self._taken += self.batch * self.world_size
        return self.read([self._window(i) for i in range(first, first + self.batch)])

    def spread(self, tokens: int) -> list[list[int]]:
        """The windows, by batch, of at most `tokens` (one at least), evenly over the file: the same ones every time."""
        count = min(self.windows, max(1, tokens // self.seq_len))
        windows = np.linspace(0, self.windows - 1, count).round().astype(int).tolist()
        return [windows[first : first + self.batch] for first in range(0, count, self.batch)]

    def _window(self, i: int) -> int:
        epoch, place = divmod(i, self.windows)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.windows)
        return int(self._order[1][place])

    def read(self, windows: list[int]) -> Batch:
        """The batch of these windows, whatever the order."""
        T, file = self.seq_len, self.token_file
        rows = np.stack([file.tokens[i * T : i * T + T + 1] for i in windows]).astype(np.int64)
        tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        if not self.packed:
            return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), None)
        bounds = [np.zeros(1, np.int64)]
        for row, i in enumerate(windows):
            # Documents that start in (first, last]: the position before each start has no target of its own document.
            lo, hi = np.searchsorted(file.offsets, (i * T, i * T + T), side="right")
            starts = np.asarray(file.offsets[lo:hi]) - i * T
            targets[row, starts - 1] = IGNORE
            bounds.append(row * T + np.union1d(starts, T))
        return Batch(
            torch.from_numpy(tokens).view(1, -1),
            torch.from_numpy(targets).view(1, -1),
            torch.from_numpy(np.concatenate(bounds)),
        )

    def state_dict(self) -> dict[str, int]:
        """Plain numbers from which the next batch follows exactly; the same on every rank."""
        return {"taken": self._taken, "windows": self.windows, "seq_len": self.seq_len, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. ValueError when the tokens, seq_len or seed differ from then."""
        for key, own in self.state_dict().items():
            if key != "taken" and state[key] != own:
                raise ValueError(f"data position was saved with {key} {state[key]}; these batches have {own}")
        self._taken = int(state["taken"])
