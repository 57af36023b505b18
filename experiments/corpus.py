"""The text of the language experiment: Python sources of this machine, with needle and recall documents between them.

A folder holds token shards as `gdn2 prepare` writes them, whose training windows are rows of one length: a row is a
piece of the sources, or documents that ask for needles or for recalled values, whole. Beside them lie the list of
source files with their hashes, and needle questions of every length, as tokens, so that all models are asked the same
without a tokenizer. The validation split is source files alone.
"""

import hashlib
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers

from gdn2.data import Tokenizer
from gdn2.data.parts import SplitWriter
from gdn2.data.shards import SPLITS, VERSION, Meta, sha256_of
from gdn2.data.text import STDLIB_EXCLUDED, find_sources
from gdn2.data.tokenizer import HuggingFaceTokenizer
from gdn2.evaluation.needles import needle_documents, niah_samples
from gdn2.evaluation.retrieval import recall_documents

END_OF_TEXT = "<|endoftext|>"
TAUGHT = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery")
# Of documents below ROOMY tokens, which the others' questions do not fit. Near needles are learned first: a memory that
# has just been initialised keeps most of what it holds for tens of tokens only.
TAUGHT_SHORT = ("niah_single_1", "niah_single_2")
ROOMY = 256
ASKED = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1")
ABOUT, FILES, QUESTIONS = "corpus.json", "files.txt", "needles.npz"
TOKENIZER_BYTES = 8_000_000  # of text that the tokenizer is learned from
HAYSTACK_BYTES = 2_000_000
CLOSING = 12  # tokens: commas between the answers of a document, its full stop and end-of-text


@dataclass(frozen=True)
class Corpus:
    """What text, and how it is cut.

    Python's standard library and the sources of installed `packages`, `text_bytes` of them at most, in tokens of a byte
    pair encoding of `vocab_size`; files with `val_share` of the text are held out. Rows have `row` tokens; of all
    training rows `needle_share` hold needle documents, as many as is drawn from `per_row`, and `recall_share` recall
    documents. `samples` questions of each task are asked at each of `lengths`.
    """

    packages: tuple[str, ...]
    text_bytes: int
    val_share: float
    vocab_size: int
    row: int
    per_row: tuple[int, ...]
    needle_share: float
    recall_share: float
    lengths: tuple[int, ...]
    samples: int
    seed: int = 0


def open_corpus(folder: Path, corpus: Corpus) -> dict[str, Any]:
    """What corpus.json says. ValueError where there is none, or the folder was made with other settings."""
    if not (folder / ABOUT).is_file():
        raise ValueError(f"{str(folder)!r} holds no {ABOUT}; expected a folder that --prepare made")
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(asdict(corpus)))
    if about["settings"] != wanted:
        raise ValueError(f"{str(folder)!r} was prepared as {about['settings']}; expected {wanted}: take another folder")
    return about


def write_corpus(folder: Path, corpus: Corpus) -> dict[str, Any]:
    """Make the folder, which appears whole or not at all; returns what corpus.json says."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        about = _write(temporary, corpus)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return about


def _write(folder: Path, corpus: Corpus) -> dict[str, Any]:
    files = list(source_files(corpus))
    listing = "".join(f"{digest}  {len(text.encode())}  {name}\n" for name, digest, text in files)
    (folder / FILES).write_text(listing, encoding="utf-8")
    split = split_files([(digest, text) for _, digest, text in files], corpus.val_share)
    tokenizer = learn_tokenizer(split["train"], corpus.vocab_size)
    tokenizer.save(folder)
    with SplitWriter(folder / "val.bin", "uint16") as val:
        for text, ids in zip(split["val"], _encode(tokenizer, split["val"])):
            val.add(ids, len(text.encode()))
    if val.tokens <= max(corpus.lengths):
        raise ValueError(f"{val.tokens} tokens are held out; expected more than {max(corpus.lengths)}: take more text")
    with SplitWriter(folder / "train.bin", "uint16") as train:
        rows = _write_rows(train, split["train"], tokenizer, corpus)
    questions = _questions(tokenizer, corpus, _haystack(split["val"]))
    np.savez_compressed(folder / QUESTIONS, **questions)
    sources = [f"{len(files)} Python files, listed in {FILES}", *(f"{n} rows of {kind}" for kind, n in rows.items())]
    Meta(
        version=VERSION,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        dtype="uint16",
        seed=corpus.seed,
        val_share=corpus.val_share,
        train=train.meta(),
        val=val.meta(),
        empty_documents=0,
        sources=sources,
        skipped=[],
        sha256={f"{name}{end}": sha256_of(folder / f"{name}{end}") for name in SPLITS for end in (".bin", ".idx.npy")},
    ).write(folder)
    about = {
        "settings": asdict(corpus),
        "files": len(files),
        "text_bytes": sum(len(text.encode()) for _, _, text in files),
        "files_sha256": sha256_of(folder / FILES),
        "train_sha256": sha256_of(folder / "train.bin"),
        "val_sha256": sha256_of(folder / "val.bin"),
        "needles_sha256": _hash(questions.values()),
        "rows": rows,
        "train_tokens": train.tokens,
        "val_tokens": val.tokens,
        "bytes_per_token": val.meta().bytes / val.tokens,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return about


def source_files(corpus: Corpus) -> Iterator[tuple[str, str, str]]:
    """Name, SHA-256 and text of each file, copies once; by hashed names, so that a limit takes some of everything."""
    found = [(source.name, source.path) for source in find_sources((), "stdlib")]
    for package in corpus.packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"package {package!r} is not installed here; expected one with Python sources")
        root = Path(spec.submodule_search_locations[0])
        paths = (path for path in root.rglob("*.py") if STDLIB_EXCLUDED.isdisjoint(path.relative_to(root).parts))
        found += [(f"{package}/{path.relative_to(root)}", path) for path in paths]
    left, seen = corpus.text_bytes, set()
    for name, path in sorted(found, key=lambda pair: hashlib.sha256(pair[0].encode()).digest()):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(raw).hexdigest()
        if text and len(raw) <= left and digest not in seen:
            left -= len(raw)
            seen.add(digest)
            yield name, digest, text


def split_files(files: Sequence[tuple[str, str]], val_share: float) -> dict[str, list[str]]:
    """Texts of the two splits; held out are those of the smallest hashes, up to the share of all text or just over."""
    ordered = [text for _, text in sorted(files)]
    sizes = np.cumsum([len(text.encode()) for text in ordered])
    held_out = int(np.searchsorted(sizes, val_share * sizes[-1])) + 1
    if held_out >= len(ordered):
        raise ValueError(f"{len(ordered)} files; expected more, to hold {val_share} of their text out")
    return {"train": ordered[held_out:], "val": ordered[:held_out]}


def learn_tokenizer(texts: Sequence[str], vocab_size: int) -> HuggingFaceTokenizer:
    """A byte pair encoding of some of the texts; every digit is a token of its own, as values are."""
    inner = Inner(models.BPE())
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_some(texts, TOKENIZER_BYTES), trainer)
    return HuggingFaceTokenizer(inner, f"byte pairs, {vocab_size}", END_OF_TEXT)


def _some(texts: Iterable[str], size: int) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        size -= len(text)
        yield text


def _haystack(texts: Sequence[str]) -> str:
    return "\n\n".join(_some(texts, HAYSTACK_BYTES))


def _encode(tokenizer: HuggingFaceTokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Ids of each text and end-of-text."""
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.inner.encode_batch(texts[start : start + 256], add_special_tokens=False):
            yield [*encoding.ids, tokenizer.end_of_text]


def _write_rows(
    train: SplitWriter, texts: Sequence[str], tokenizer: HuggingFaceTokenizer, corpus: Corpus
) -> dict[str, int]:
    """Rows of the three kinds; returns how many there are of each."""
    flat = np.concatenate([np.array(ids, np.uint16) for ids in _encode(tokenizer, texts)])
    pieces = len(flat) // corpus.row
    size = round(corpus.row * sum(len(text.encode()) for text in texts) / len(flat))
    for piece in flat[: pieces * corpus.row].reshape(pieces, corpus.row):
        train.add(piece.tolist(), size)
    left = 1 - corpus.needle_share - corpus.recall_share
    rows = {
        "source": pieces,
        "needles": round(pieces * corpus.needle_share / left),
        "recall": round(pieces * corpus.recall_share / left),
    }
    haystack, recall = _haystack(texts), recall_documents(10**9, corpus.seed)
    rng = random.Random(corpus.seed)
    streams = {}
    for many in corpus.per_row:
        room = corpus.row // many
        tasks = TAUGHT if room >= ROOMY else TAUGHT_SHORT
        streams[many] = needle_documents(10**9, room - CLOSING, tokenizer, corpus.seed + many, tasks, haystack)
    for _ in range(rows["needles"]):
        many = rng.choice(corpus.per_row)
        _add_row(train, (next(streams[many]) for _ in range(many)), tokenizer, corpus.row)
    for _ in range(rows["recall"]):
        _add_row(train, recall, tokenizer, corpus.row)
    return rows


def _add_row(train: SplitWriter, documents: Iterable[str], tokenizer: Tokenizer, row: int) -> None:
    """A row of documents, each with its end-of-text, as many as fit; the rest is end-of-text too."""
    ids: list[int] = []
    size = 0
    for document in documents:
        more = [*tokenizer.encode(document), tokenizer.end_of_text]
        if len(ids) + len(more) > row:
            break
        ids += more
        size += len(document.encode())
    if not ids:
        raise ValueError(f"a row has {row} tokens; expected room for a document")
    train.add(ids + [tokenizer.end_of_text] * (row - len(ids)), size)


def _questions(tokenizer: Tokenizer, corpus: Corpus, haystack: str) -> dict[str, np.ndarray]:
    """For each task and length: tokens [n, longest] of prompts with their answers, end-of-text behind them; spans
    [n, 2], where the answers begin and end; depths [n], percent."""
    arrays = {}
    for task in ASKED:
        for length in corpus.lengths:
            rows, spans, depths = [], [], []
            for sample in niah_samples(task, tokenizer, length, corpus.samples, corpus.seed, haystack):
                prompt = tokenizer.encode(sample.prompt)
                whole = tokenizer.encode(f"{sample.prompt} {sample.answers[0]}")
                if whole[: len(prompt)] != prompt:
                    raise ValueError(f"the answer {sample.answers[0]!r} changes the tokens of its prompt")
                rows.append(whole)
                spans.append((len(prompt), len(whole)))
                depths.append(sample.depth)
            tokens = np.full((len(rows), max(map(len, rows))), tokenizer.end_of_text, np.uint16)
            for i, row in enumerate(rows):
                tokens[i, : len(row)] = row
            name = f"{task}/{length}"
            arrays |= {f"{name}/tokens": tokens, f"{name}/spans": np.array(spans), f"{name}/depths": np.array(depths)}
    return arrays


def _hash(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()
