"""Text to token shards: read, tokenize, split by document, write, hash; a folder appears whole or not at all.

The sources are cut into pieces, each becomes a part in the hidden folder .OUT.parts, and all of them are joined in the
order of the sources. So the result does not depend on the number of workers, nor on how often the work was killed:
what is there already is not done again, and no document comes twice or is lost.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from gdn2.data.hub import hub_pieces
from gdn2.data.lock import NAME as LOCK
from gdn2.data.lock import FolderLock
from gdn2.data.parts import Part, Recipe, join, read_part, write_part
from gdn2.data.pieces import PIECE_BYTES, cut, fingerprint
from gdn2.data.progress import Progress, Report
from gdn2.data.shards import SPLITS, VERSION, Meta, flush, sha256_of
from gdn2.data.text import describe, find_sources
from gdn2.data.tokenizer import Tokenizer, load_tokenizer
from gdn2.data.workers import Readable, tokenize, tokenize_all

SHARD_TOKENS = 1 << 30  # 2 GiB of 16-bit tokens


class EmptyCorpusError(ValueError):
    """All sources are read, and no document of them has a token."""


def prepare(
    out: str | Path,
    sources: Sequence[str | Path] = (),
    *,
    corpus: str | None = None,
    hub: str | None = None,
    hub_config: str | None = None,
    hub_split: str = "train",
    revision: str | None = None,
    documents: Mapping[str, Iterable[str]] = MappingProxyType({}),
    tokenizer: str = "bytes",
    field: str = "text",
    val_share: float = 0.05,
    seed: int = 0,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    piece_bytes: int = PIECE_BYTES,
    progress: Report | None = None,
) -> Meta:
    """Write the folder of token shards `out` from files and folders, from a named `corpus` ("stdlib"), or from a `hub`
    data set (a name on the Hugging Face hub, or a local folder in its layout).

    A file is a document; of .jsonl and .parquet files and of data sets each record's `field` is one. `documents` are
    further texts that follow, or all there is, under names that meta.json lists among the sources; they are drawn anew
    each time. Which split a document goes to is a hash of its text and `seed`, so it does not move when other documents
    come or go, and copies stay together. Documents without a token are left out. A file found in a folder that is not
    UTF-8 is left out and named in meta.json; named itself, it is an error.

    `workers` processes share the pieces of about `piece_bytes` bytes. A split of more than `shard_tokens` tokens lies
    in several files. `progress` hears of every document, with several workers of every piece.

    Killed or failed, the same call goes on from the parts that are done. ValueError for bad input, FileExistsError when
    `out` is there already, ChildProcessError when a worker was killed.
    """
    out = Path(out)
    if not 0 < val_share < 1:
        raise ValueError(f"val_share is {val_share!r}; expected a number in (0, 1): training needs text to validate on")
    for name, value in (("workers", workers), ("shard_tokens", shard_tokens), ("piece_bytes", piece_bytes)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    work = out.with_name(f".{out.name}.parts")
    if os.path.lexists(out):
        left = f"; {str(work)!r} holds parts from before it was there" if work.is_dir() else ""
        raise FileExistsError(f"{str(out)!r} exists already; choose another folder or remove it first{left}")
    if hub is not None and (sources or corpus is not None):
        raise ValueError("give a hub data set, or files and folders, or a corpus: one of the three")
    names: list[str]
    pieces: Sequence[Readable]
    if hub is not None:
        found = hub_pieces(hub, hub_config, hub_split, revision)
        pieces, names = found, [found[0].describe()]
    elif documents and not sources and corpus is None:
        pieces, names = [], []
    else:
        pieces, names = cut(find_sources(sources, corpus), piece_bytes), describe(sources, corpus)
    tokens = load_tokenizer(tokenizer)
    recipe = Recipe("uint16" if tokens.vocab_size <= 1 << 16 else "uint32", val_share, seed, field)
    with FolderLock(work):
        try:
            parts = _parts(work, pieces, tokens, recipe, workers, documents, progress)
            meta = _join(work / "whole", parts, tokens, recipe, shard_tokens, [*names, *documents])
            os.rename(work / "whole", out)
            flush(out.absolute().parent)
            shutil.rmtree(work)
        except BaseException as error:
            _leave(work, error)
            raise
    return meta


def _parts(
    work: Path,
    pieces: Sequence[Readable],
    tokenizer: Tokenizer,
    recipe: Recipe,
    workers: int,
    documents: Mapping[str, Iterable[str]],
    progress: Report | None,
) -> list[Part]:
    """The parts of all pieces in their order, those of an earlier call among them, and then of the documents."""
    how = [VERSION, tokenizer.definition(), recipe.dtype, recipe.val_share, recipe.seed, recipe.field]
    folders = [work / f"{i:06d}-{fingerprint(how, piece.identity)}" for i, piece in enumerate(pieces)]
    wanted = {folder.name for folder in folders}
    for path in work.iterdir():  # of other settings, of files that changed, and what a killed process left
        if path.name not in wanted and path.name != LOCK:
            shutil.rmtree(path)
    done = {folder: read_part(folder) for folder in folders if folder.is_dir()}
    size_of = {folder: piece.size for piece, folder in zip(pieces, folders)}
    total = sum(size_of.values())
    skipped: str | None = None

    def tell(extra_bytes: float = 0, extra_documents: int = 0, extra_tokens: int = 0) -> None:
        if progress is not None:
            counts = [part.split(name) for part in done.values() for name in SPLITS]
            progress(Progress(
                int(sum(size_of.get(folder, 0) for folder in done) + extra_bytes), total,
                sum(c.documents for c in counts) + extra_documents, sum(c.tokens for c in counts) + extra_tokens,
                skipped,
            ))  # fmt: skip

    def add(part: Part) -> None:
        nonlocal skipped
        done[part.folder] = part
        for name in part.skipped:
            skipped = name
            tell()
        tell()

    todo = [(piece, folder) for piece, folder in zip(pieces, folders) if folder not in done]
    if workers > 1 and len(todo) > 1:
        (work / "tokenizer").mkdir()
        tokenizer.save(work / "tokenizer")
        for _, part in tokenize_all(todo, work / "tokenizer", recipe, workers):
            add(part)
    else:
        for piece, folder in todo:
            size = piece.size
            add(tokenize(piece, folder, tokenizer, recipe, lambda share, *n, size=size: tell(share * size, *n)))
    if documents:
        texts = chain.from_iterable(documents.values())
        add(write_part(work / "documents", texts, (), tokenizer, recipe, lambda *n: tell(0, *n)))
        folders.append(work / "documents")
    return [done[folder] for folder in folders]


def _join(
    out: Path, parts: Sequence[Part], tokenizer: Tokenizer, recipe: Recipe, shard_tokens: int, sources: list[str]
) -> Meta:
    _check_split(parts, recipe.val_share)
    out.mkdir()
    train, val = (join(parts, out, split, recipe.dtype, shard_tokens) for split in SPLITS)
    tokenizer.save(out)
    data = sorted(p for p in out.iterdir() if p.name.startswith(SPLITS))
    meta = Meta(
        version=VERSION,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        dtype=recipe.dtype,
        seed=recipe.seed,
        val_share=recipe.val_share,
        train=train,
        val=val,
        empty_documents=sum(part.empty for part in parts),
        sources=sources,
        skipped=[name for part in parts for name in part.skipped],
        sha256={path.name: sha256_of(path) for path in data},
        shard_tokens=shard_tokens,
    )
    meta.write(out)
    for path in (*out.iterdir(), out):
        flush(path)
    return meta


def _check_split(parts: Sequence[Part], val_share: float) -> None:
    train, val = (sum(part.split(name).documents for part in parts) for name in SPLITS)
    if train + val == 0:
        empty, skipped = sum(part.empty for part in parts), sum(len(part.skipped) for part in parts)
        raise EmptyCorpusError(
            f"the sources hold no text: {empty:,} empty documents, {skipped:,} files that are not UTF-8"
        )
    if train == 0 or val == 0:
        missing = "training" if train == 0 else "validation"
        raise ValueError(
            f"no document of {train + val} fell into the {missing} split (val_share {val_share}); "
            "a document goes to one split whole: give more documents (a long file cut in parts), or another seed"
        )


def _leave(work: Path, error: BaseException) -> None:
    """After an error: keep the parts that are done and say so, or leave nothing where they hold nothing."""
    done = not isinstance(error, EmptyCorpusError) and sum(
        (path / "part.json").is_file() and not path.name.startswith(".") for path in work.iterdir()
    )
    if done:
        error.add_note(
            f"parts done and kept in {str(work)!r}: {done}; a command with the same settings goes on from there"
        )
    else:
        shutil.rmtree(work, ignore_errors=True)
