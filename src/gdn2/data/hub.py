"""Data sets of the Hugging Face hub, or in its layout in a local folder, streamed shard by shard by `datasets`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gdn2.data.text import Document, whole_text


@dataclass(frozen=True)
class HubPiece:
    """Shard `index` of `count` of a data set: one or more of the files that it lies in."""

    name: str
    config: str | None
    split: str
    revision: str | None
    index: int = 0
    count: int = 1
    size = 0  # not known before it is read

    @property
    def identity(self) -> list[Any]:
        files = []
        if Path(self.name).is_dir():
            stats = [(p, p.stat()) for p in sorted(Path(self.name).rglob("*")) if p.is_file()]
            files = [(str(p), s.st_size, s.st_mtime_ns) for p, s in stats]
        return ["hub", self.name, self.config, self.split, self.revision, self.index, self.count, files]

    def read(self, field: str, skipped: list[str]) -> Iterator[Document]:
        """Its documents. ValueError for a record without text in `field`."""
        shard = load(self).shard(num_shards=self.count, index=self.index)
        for number, record in enumerate(shard, start=1):
            text = record.get(field)
            if not isinstance(text, str):
                raise ValueError(
                    f"{self.describe()}: record {number} of shard {self.index} has no text in field {field!r}; "
                    f"expected one of its fields, {', '.join(record)}"
                )
            yield Document(whole_text(text), 0.0)

    def describe(self) -> str:
        return ":".join(filter(None, (self.name, self.config, self.split, self.revision)))


def hub_pieces(name: str, config: str | None, split: str, revision: str | None) -> list[HubPiece]:
    """A piece for each shard of the data set, and on the hub its revision of today where none is given.

    ValueError without the package datasets, and when the data set cannot be found or reached.
    """
    whole = HubPiece(name, config, split, revision or _revision_of_today(name))
    count = load(whole).num_shards
    return [replace(whole, index=i, count=count) for i in range(count)]


def load(piece: HubPiece) -> Any:
    """The whole data set, streaming."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"data set {piece.name!r} needs the package datasets: pip install 'gdn2[data]'") from error
    try:
        return load_dataset(piece.name, piece.config, split=piece.split, revision=piece.revision, streaming=True)
    except Exception as error:  # the hub's, the network's and the format's errors share no base
        raise ValueError(f"data set {piece.describe()!r} cannot be read: {error}") from error


def _revision_of_today(name: str) -> str | None:
    """The commit that the hub gives now, so that a preparation that goes on later reads the same; None for a folder."""
    if Path(name).is_dir():
        return None
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ValueError(f"data set {name!r} needs the package datasets: pip install 'gdn2[data]'") from error
    try:
        commit: str | None = HfApi().dataset_info(name).sha
    except Exception as error:
        raise ValueError(f"data set {name!r}: the Hugging Face hub cannot give it: {error}") from error
    return commit
