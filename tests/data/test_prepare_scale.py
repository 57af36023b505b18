"""`prepare` in pieces: by several processes, killed at any moment, into several files; every document exactly once."""

import importlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from gdn2.data import Shards, TokenBatches, load_tokenizer, prepare, workers
from gdn2.data.lock import FolderLock
from gdn2.data.pieces import Piece, cut
from gdn2.data.shards import JoinedTokens
from gdn2.data.text import Source

module = importlib.import_module("gdn2.data.prepare")  # the package's name for it is the function
JsonlWriter = Callable[..., Path]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def texts_of(folder: Path) -> Counter[str]:
    shards, tokenizer = Shards(folder), load_tokenizer(folder)
    splits = [shards.split(name) for name in ("train", "val")]
    return Counter(
        tokenizer.decode(f.tokens[int(a) : int(b)].tolist()) for f in splits for a, b in zip(f.offsets, f.offsets[1:])
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """JSON lines, Parquet in row groups, and text, of some 60 KB together; every document is different."""
    import pyarrow
    import pyarrow.parquet

    rng, root = random.Random(0), tmp_path / "tree"
    root.mkdir()

    def texts(name: str, n: int) -> list[str]:
        return [f"{name} {i} é " + "word " * rng.randrange(1, 60) for i in range(n)]

    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts("line", 120))]
    (root / "a.jsonl").write_text("\n".join([*lines[:60], "", *lines[60:]]), encoding="utf-8")  # no newline at the end
    table = pyarrow.table({"text": texts("row", 100), "other": list(range(100))})
    pyarrow.parquet.write_table(table, root / "b.parquet", row_group_size=9)
    for i, text in enumerate(texts("file", 20)):
        (root / f"c{i:02d}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def whole(tree: Path, tmp_path: Path) -> Path:
    prepare(tmp_path / "whole", [tree], val_share=0.2)
    return tmp_path / "whole"


@pytest.mark.parametrize("piece_bytes", [700, 5_000, 40_000])
def test_pieces_of_any_size_give_the_same_files(tree: Path, whole: Path, tmp_path: Path, piece_bytes: int) -> None:
    prepare(tmp_path / "out", [tree], val_share=0.2, piece_bytes=piece_bytes)
    assert files_of(tmp_path / "out") == files_of(whole)
    assert sum(texts_of(tmp_path / "out").values()) == 240
    assert set(texts_of(tmp_path / "out").values()) == {1}
    assert {p.name for p in tmp_path.iterdir()} == {"tree", "whole", "out"}


def test_ranges_of_lines_meet_without_gap_or_overlap(tmp_path: Path, write_jsonl: JsonlWriter) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": "x" * n} for n in range(1, 12)), "", {"text": "end"})
    for piece_bytes in range(1, path.stat().st_size + 2):
        pieces = cut([Source(path, explicit=True)], piece_bytes)
        texts = [text for piece in pieces for text, _ in piece.read("text", [])]
        assert texts == [*("x" * n for n in range(1, 12)), "end"], piece_bytes


def test_error_in_a_range_names_its_line_and_row(tmp_path: Path, write_jsonl: JsonlWriter) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": f"{n}"} for n in range(50)), "{", *({"text": "x"},) * 9)
    for piece_bytes in (60, 333):
        with pytest.raises(ValueError, match=r"a\.jsonl:51: not a line of JSON"):
            prepare(tmp_path / "out", [path], val_share=0.5, piece_bytes=piece_bytes)


def prepare_in_child(out: Path, tree: Path, **options: Any) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            prepare(out, [tree], val_share=0.2, **options)
            code = 0
        finally:
            os._exit(code)
    return pid


def test_kills_at_random_moments_change_nothing(tree: Path, whole: Path, tmp_path: Path) -> None:
    """Many short lives: whatever each was doing, reading, writing a part or joining them, the next goes on.

    Each may last a little longer than the one before, so that a slow machine comes to an end too.
    """
    rng, killed, lives, kept = random.Random(1), 0, 0, 0
    began = time.perf_counter()
    os.waitpid(prepare_in_child(tmp_path / "timed", tree, piece_bytes=2_000, shard_tokens=10_000), 0)
    life = time.perf_counter() - began
    for number in range(4):
        out, longest = tmp_path / f"out{number}", 0.5 * life
        while not out.exists():
            pid = prepare_in_child(out, tree, piece_bytes=2_000, shard_tokens=10_000)
            time.sleep(longest * rng.uniform(0.04, 1.0))
            longest *= 1.05
            os.kill(pid, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            lives += 1
            kept += any((tmp_path / f".{out.name}.parts").glob("0*"))
            assert lives < 200
        assert files_of(out) == files_of(tmp_path / "timed")
    assert killed >= 3
    assert kept >= 1
    assert texts_of(tmp_path / "out0") == texts_of(whole)


def test_workers_end_with_a_killed_parent_and_the_work_goes_on(tree: Path, whole: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "out", tmp_path / ".out.parts"
    pid = prepare_in_child(out, tree, piece_bytes=300, workers=2)
    while not any(parts.glob("0*")):
        time.sleep(0.01)
    children = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert len(children) >= 2
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not out.exists()
    seen: list[Any] = []
    prepare(out, [tree], val_share=0.2, piece_bytes=300, workers=2, progress=seen.append)
    assert files_of(out) == files_of(whole)
    assert seen[-1].documents == 240
    assert len(seen) > 20


def test_killed_worker_is_told_and_the_work_goes_on(tree: Path, whole: Path, tmp_path: Path) -> None:
    parts, killed = tmp_path / ".out.parts", []

    def kill_one(_: Any) -> None:
        if not killed:
            children = psutil.Process().children(recursive=True)
            killed.append(next(p for p in children if "spawn_main" in " ".join(p.cmdline())))
            killed[0].kill()

    with pytest.raises(ChildProcessError, match="one of 2 worker processes was killed") as caught:
        prepare(tmp_path / "out", [tree], val_share=0.2, piece_bytes=2_000, workers=2, progress=kill_one)
    assert any(parts.glob("0*"))
    assert "goes on from there" in caught.value.__notes__[0]
    prepare(tmp_path / "out", [tree], val_share=0.2, piece_bytes=2_000)
    assert files_of(tmp_path / "out") == files_of(whole)


def test_finished_parts_are_not_done_again_unless_their_file_or_a_setting_changed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Piece] = []
    said: list[str] = []
    plain = workers.tokenize

    def count(piece: Piece, *rest: Any) -> Any:
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append(piece)
        return plain(piece, *rest)

    monkeypatch.setattr(module, "tokenize", count)

    def attempt(**options: Any) -> int:
        done.clear()
        try:
            prepare(tmp_path / "out", [tree], piece_bytes=2_000, **{"val_share": 0.2} | options)
        except KeyboardInterrupt as error:
            said.extend(error.__notes__)
        return len(done)

    pieces = len(cut([Source(p, explicit=False) for p in sorted(tree.iterdir())], 2_000))
    limit = 8
    assert attempt() == 8
    assert said[0].startswith("parts done and kept in ")
    assert "8; a command with the same settings" in said[0]
    limit = 3
    assert attempt() == 3
    (tree / "a.jsonl").write_text((tree / "a.jsonl").read_text().replace("line 0 ", "line 0! "))
    assert attempt() == 3  # of a.jsonl, all of whose pieces are to do again
    limit = pieces
    assert attempt(seed=5) == pieces
    assert next(t for t in texts_of(tmp_path / "out") if t.startswith("line 0")).startswith("line 0! ")


def test_file_that_changes_while_it_is_read_is_an_error(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Piece.read

    def read(self: Piece, *rest: Any) -> Any:
        yield from plain(self, *rest)
        with self.files[0].path.open("a") as file:
            file.write("\n")

    monkeypatch.setattr(Piece, "read", read)
    with pytest.raises(ValueError, match=r"a\.jsonl.* changed while it was read; repeat the command"):
        prepare(tmp_path / "out", [tree], val_share=0.2)


def test_two_at_once_into_one_folder_are_refused(tree: Path, tmp_path: Path) -> None:
    with FolderLock(tmp_path / ".out.parts"), pytest.raises(ValueError, match=r"is in use by process \d+"):
        prepare(tmp_path / "out", [tree], val_share=0.2)


def test_several_files_read_as_one(tree: Path, whole: Path, tmp_path: Path) -> None:
    meta = prepare(tmp_path / "out", [tree], val_share=0.2, shard_tokens=1_000)
    names = meta.files("train")
    assert names == [f"train-{i:05d}.bin" for i in range(-(-meta.train.tokens // 1_000))]
    assert b"".join((tmp_path / "out" / n).read_bytes() for n in names) == (whole / "train.bin").read_bytes()
    one, many = Shards(whole).split("train"), Shards(tmp_path / "out").split("train")
    assert isinstance(many.tokens, JoinedTokens)
    assert len(many) == len(one)
    for packed in (False, True):
        a, b = (TokenBatches(file, 333, 4, seed=3, packed=packed) for file in (one, many))
        for _ in range(20):
            for x, y in zip(next(a), next(b)):
                assert (x is None and y is None) or torch.equal(x, y)
    shards = Shards(tmp_path / "out")
    shards.verify()
    assert shards.meta.digest("train") != Shards(whole).meta.digest("train") == meta_sha(whole)
    flipped = bytearray((tmp_path / "out" / names[2]).read_bytes())
    flipped[100] ^= 1
    (tmp_path / "out" / names[2]).write_bytes(flipped)
    with pytest.raises(ValueError, match=r"train-00002\.bin' does not match its checksum"):
        shards.verify("train")
    (tmp_path / "out" / names[3]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00003\.bin' has 0 bytes, meta\.json says 2000"):
        Shards(tmp_path / "out")


def meta_sha(folder: Path) -> str:
    value: str = json.loads((folder / "meta.json").read_text())["sha256"]["train.bin"]
    return value


def test_slices_over_files_are_those_of_one_array() -> None:
    whole = np.arange(23)
    joined = JoinedTokens([whole[:10], whole[10:20], whole[20:]], 10)
    assert len(joined) == 23
    for start in range(-3, 25):
        for stop in range(-3, 30):
            assert joined[start:stop].tolist() == whole[start:stop].tolist()
    assert joined[:].tolist() == whole.tolist()
    with pytest.raises(ValueError, match="expected steps of 1"):
        joined[::2]


def test_data_set_in_the_hubs_layout_is_streamed_by_shards(
    tmp_path: Path, write_jsonl: JsonlWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(3):
        write_jsonl(folder / f"train-{n}.jsonl", *({"content": f"{n} {i}"} for i in range(20)))
    meta = prepare(tmp_path / "out", hub=str(folder), field="content", val_share=0.2)
    assert texts_of(tmp_path / "out") == Counter(f"{n} {i}" for n in range(3) for i in range(20))
    assert meta.sources == [f"{folder}:train"]
    with pytest.raises(ValueError, match=r"record 1 of shard 0 has no text in field 'text'; expected .* content"):
        prepare(tmp_path / "other", hub=str(folder), val_share=0.2)
    with pytest.raises(ValueError, match="split"):
        prepare(tmp_path / "other", hub=str(folder), hub_split="none", val_share=0.2)
    with pytest.raises(ValueError, match="one of the three"):
        prepare(tmp_path / "other", [folder], hub=str(folder))


@pytest.mark.parametrize("name", ["workers", "shard_tokens", "piece_bytes"])
def test_counts_below_one_are_refused(tree: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        prepare(tmp_path / "out", [tree], **{name: 0})  # type: ignore[arg-type]
