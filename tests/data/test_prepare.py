import importlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gdn2.data import Shards, load_tokenizer, parts, prepare, show_progress
from gdn2.data.progress import Progress
from gdn2.data.shards import TokenFile
from gdn2.data.text import Source

JsonlWriter = Callable[..., Path]
module = importlib.import_module("gdn2.data.prepare")  # the package's name for it is the function

AB_AND_C = ("ab", "c")
SEED = 7  # sends, of these two, "ab" to training and "c" to validation when the share is 0.5


def split_documents(file: TokenFile) -> list[list[int]]:
    return [file.tokens[a:b].tolist() for a, b in zip(file.offsets[:-1], file.offsets[1:])]


def all_texts(folder: Path) -> list[str]:
    """Every document's text, sorted; each must end with the one end-of-text token it holds."""
    shards, tokenizer = Shards(folder), load_tokenizer(folder)
    texts = []
    for name in ("train", "val"):
        for document in split_documents(shards.split(name)):
            assert document[-1] == tokenizer.end_of_text
            assert document.count(tokenizer.end_of_text) == 1
            texts.append(tokenizer.decode(document))
    return sorted(texts)


def test_every_document_comes_back_once(texts: Path, tmp_path: Path) -> None:
    meta = prepare(tmp_path / "out", [texts], val_share=0.3)
    originals = sorted(p.read_text() for p in texts.rglob("*.txt"))
    assert all_texts(tmp_path / "out") == originals
    assert meta.train.documents + meta.val.documents == 20
    assert meta.train.bytes + meta.val.bytes == sum(len(t.encode()) for t in originals)
    assert meta.dtype == "uint16"
    Shards(tmp_path / "out").verify()


def test_hugging_face_tokenizer_travels_with_the_shards(texts: Path, tmp_path: Path, bpe_file: Path) -> None:
    meta = prepare(tmp_path / "out", [texts], tokenizer=str(bpe_file), val_share=0.3)
    assert all_texts(tmp_path / "out") == sorted(p.read_text() for p in texts.rglob("*.txt"))
    assert meta.vocab_size == load_tokenizer(tmp_path / "out").vocab_size
    assert meta.tokenizer == str(bpe_file)


def test_wide_vocabulary_takes_four_bytes(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = load_tokenizer("bytes")
    monkeypatch.setattr(wide, "vocab_size", 70_000)
    monkeypatch.setattr(module, "load_tokenizer", lambda spec: wide)
    assert prepare(tmp_path / "out", [texts], val_share=0.3).dtype == "uint32"
    assert all_texts(tmp_path / "out") == sorted(p.read_text() for p in texts.rglob("*.txt"))


def test_split_is_stable_when_documents_come_and_go(texts: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "a", [texts], val_share=0.3)
    (texts / "00.txt").unlink()
    (texts / "new.txt").write_text("new")
    prepare(tmp_path / "b", [texts], val_share=0.3)
    before, after = ({tuple(d) for d in split_documents(Shards(tmp_path / name).split("val"))} for name in ("a", "b"))
    gone_or_new = {(*f"{text}".encode(), 256) for text in ("document 0 says héllo\n", "new")}
    assert before - gone_or_new == after - gone_or_new != set()


def test_same_input_gives_the_same_files_and_another_seed_another_split(texts: Path, tmp_path: Path) -> None:
    hashes = [prepare(tmp_path / str(i), [texts], val_share=0.4, seed=s).sha256 for i, s in enumerate((0, 0, 1))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_copies_of_a_document_stay_together(tmp_path: Path, write_jsonl: JsonlWriter) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": f"t{i % 10}"} for i in range(100)))
    prepare(tmp_path / "out", [path], val_share=0.4)
    train, val = ({tuple(d) for d in split_documents(Shards(tmp_path / "out").split(s))} for s in ("train", "val"))
    assert not train & val


def test_documents_without_a_token_are_counted_and_left_out(tmp_path: Path, write_jsonl: JsonlWriter) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    records = [{"text": text} for text in ("", "\n", *AB_AND_C)]
    path = write_jsonl(tmp_path / "a.jsonl", *records)
    assert prepare(tmp_path / "bytes", [path], val_share=0.5, seed=SEED).empty_documents == 1
    words = Tokenizer(models.WordLevel({"<eos>": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    meta = prepare(tmp_path / "words", [path], tokenizer=str(tmp_path / "words.json"), val_share=0.5, seed=SEED)
    assert meta.empty_documents == 2
    assert (meta.train.tokens, meta.val.tokens) == (2, 2)


def test_further_documents_follow_and_are_listed(texts: Path, tmp_path: Path) -> None:
    meta = prepare(tmp_path / "out", [texts], documents={"three extras": iter("xyz")}, val_share=0.3)
    assert all_texts(tmp_path / "out") == sorted([p.read_text() for p in texts.rglob("*.txt")] + ["x", "y", "z"])
    assert meta.sources == [str(texts), "three extras"]
    prepare(tmp_path / "alone", documents={"letters": iter("abcdefgh")}, val_share=0.5)
    assert all_texts(tmp_path / "alone") == list("abcdefgh")
    with pytest.raises(ValueError, match="give either files and folders or a corpus"):
        prepare(tmp_path / "none")


def test_undecodable_file_is_skipped_in_a_folder_and_refused_by_name(texts: Path, tmp_path: Path) -> None:
    bad = texts / "bad.txt"
    bad.write_bytes(b"\xff")
    seen: list[Progress] = []
    meta = prepare(tmp_path / "out", [texts], val_share=0.3, progress=seen.append)
    assert meta.skipped == [str(bad)]
    assert seen[-1].skipped == str(bad)
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["skipped"] == [str(bad)]
    link = texts / "link.txt"
    link.symlink_to(tmp_path / "gone.txt")
    assert prepare(tmp_path / "linked", [texts], val_share=0.3).skipped == [str(bad), str(link)]
    with pytest.raises(ValueError, match=r"bad\.txt: not UTF-8"):
        prepare(tmp_path / "other", [bad], val_share=0.3)
    assert not (tmp_path / "other").exists()


def test_corpus_names_what_it_left_out_without_this_machines_folders(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (texts / "sub" / "bad.txt").write_bytes(b"\xff")
    files = [Source(path, explicit=False, root=texts) for path in sorted(texts.rglob("*.txt"))]
    monkeypatch.setattr(module, "find_sources", lambda sources, corpus: files)
    assert prepare(tmp_path / "out", corpus="stdlib", val_share=0.3).skipped == [str(Path("sub", "bad.txt"))]


def test_bad_record_in_a_folder_is_an_error(texts: Path, tmp_path: Path, write_jsonl: JsonlWriter) -> None:
    write_jsonl(texts / "a.jsonl", "{")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not a line of JSON"):
        prepare(tmp_path / "out", [texts])


def test_existing_folder_is_refused_and_untouched(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match=r"exists already; choose another folder or remove it first$"):
        prepare(out, [texts])
    assert [p.name for p in out.iterdir()] == ["mine"]
    (tmp_path / ".out.parts").mkdir()  # as a kill between the last rename and the end leaves it
    with pytest.raises(FileExistsError, match=r"first; '\S*\.out\.parts' holds parts from before it was there$"):
        prepare(out, [texts])


@pytest.mark.parametrize("share", [-0.1, 0, 1.0, float("nan")])
def test_share_out_of_range_is_refused(texts: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match=r"val_share is .*; expected a number in \(0, 1\): training needs text to"):
        prepare(tmp_path / "out", [texts], val_share=share)


def test_split_without_documents_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one document")
    with pytest.raises(ValueError, match="no document of 1 fell into the validation split"):
        prepare(tmp_path / "out", [path], val_share=0.01)
    with pytest.raises(ValueError, match="no document of 1 fell into the training split"):
        prepare(tmp_path / "out", [path], val_share=0.9999)


def test_sources_without_text_are_refused_and_leave_nothing_to_go_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("")
    (folder / "b.txt").write_bytes(b"\xff")
    said = "the sources hold no text: 1 empty documents, 1 files that are not UTF-8$"
    with pytest.raises(ValueError, match=said) as caught:
        prepare(tmp_path / "out", [folder])
    assert not hasattr(caught.value, "__notes__")
    assert os.listdir(tmp_path) == ["texts"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_nothing_behind(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(parts.SplitWriter, "add", fail)
    with pytest.raises(type(error)):
        prepare(tmp_path / "out", [texts])
    assert os.listdir(tmp_path) == ["texts"]


def test_progress_reaches_the_end(texts: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    meta = prepare(tmp_path / "out", [texts], val_share=0.3, progress=seen.append)
    last = seen[-1]
    assert last.done_bytes == last.total_bytes == sum(p.stat().st_size for p in texts.rglob("*.txt"))
    assert last.tokens == meta.train.tokens + meta.val.tokens


def test_progress_hears_of_every_document(tmp_path: Path, write_jsonl: JsonlWriter) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(300)))
    seen: list[Progress] = []
    prepare(tmp_path / "out", [path], documents={"extras": map(str, range(50))}, val_share=0.3, progress=seen.append)
    assert {p.documents for p in seen} == set(range(1, 351))
    size = path.stat().st_size
    half = next(p for p in seen if p.documents == 150)
    assert half.done_bytes == pytest.approx(size / 2, rel=0.05)  # the numbers' digits make lines differ
    assert all(p.done_bytes == size for p in seen[-50:])


def test_plain_lines_never_fall_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    with show_progress(stream) as report:
        for i in range(31):
            now = float(i)
            report(Progress(100, 100, i, 10 * i))
    assert [line.split()[2] for line in stream.getvalue().splitlines()] == ["0", "11", "22"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["plain", "terminal"])
def test_progress_is_shown_and_names_what_was_left_out(stream: io.StringIO, tmp_path: Path) -> None:
    with show_progress(stream) as report:
        report(Progress(50, 100, 3, 1_234))
        report(Progress(100, 100, 4, 5_678, skipped="bad.txt"))
    shown = stream.getvalue()
    assert "left out, no UTF-8 text: bad.txt" in shown
    assert "5,678" in shown
    assert ("50 %" in shown) == (not stream.isatty())


def test_tokens_are_little_endian_on_disk(tmp_path: Path, write_jsonl: JsonlWriter) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in AB_AND_C))
    prepare(tmp_path / "out", [path], val_share=0.5, seed=SEED)
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"a\0b\0\0\1"
    assert np.load(tmp_path / "out" / "train.idx.npy").tolist() == [0, 3]
