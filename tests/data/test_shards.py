import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from gdn2.data import Shards, TokenBatches, prepare
from gdn2.data.shards import Batch, TokenFile

JsonlWriter = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, write_jsonl: JsonlWriter) -> Path:
    """Byte-level shards of documents of 2 to 41 tokens."""
    rng = np.random.default_rng(0)
    records = [{"text": "".join(map(chr, rng.integers(97, 123, n)))} for n in rng.integers(1, 41, 60)]
    prepare(tmp_path / "shards", [write_jsonl(tmp_path / "a.jsonl", *records)], val_share=0.2)
    return tmp_path / "shards"


@pytest.fixture
def train_file(folder: Path) -> TokenFile:
    return Shards(folder).split("train")


def starts_of(batch: Batch, file: TokenFile, seq_len: int) -> list[int]:
    """Which windows a batch holds, found by content (the random text makes windows unique)."""
    windows = [tuple(file.tokens[i : i + seq_len]) for i in range(0, len(file) - seq_len, seq_len)]
    return [windows.index(tuple(row)) for row in batch.tokens.view(-1, seq_len).numpy()]


@pytest.mark.parametrize("packed", [False, True])
def test_targets_are_the_next_tokens(train_file: TokenFile, packed: bool) -> None:
    T = 16
    batch = next(TokenBatches(train_file, T, 4, seed=0, packed=packed))
    rows = zip(batch.tokens.view(-1, T).numpy(), batch.targets.view(-1, T).numpy())
    for place, (tokens, targets) in zip(starts_of(batch, train_file, T), rows):
        span = train_file.tokens[place * T : place * T + T + 1]
        assert (tokens == span[:-1]).all()
        assert ((targets == span[1:]) | (targets == -100)).all()
        assert ((targets == -100) == (packed & (tokens == 256))).all()


def test_packed_boundaries_are_windows_and_documents(train_file: TokenFile) -> None:
    T, B = 16, 5
    batch = next(TokenBatches(train_file, T, B, seed=3, packed=True))
    assert batch.tokens.shape == batch.targets.shape == (1, B * T)
    tokens = batch.tokens[0].tolist()
    expected = {i for i in range(B * T) if i % T == 0 or tokens[i - 1] == 256} | {B * T}
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == sorted(expected)
    assert batch.cu_seqlens.dtype == torch.int64
    assert len(expected) > B + 1  # documents did end inside windows


def test_document_boundary_on_a_window_boundary_counts_once(tmp_path: Path, write_jsonl: JsonlWriter) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": c * 3} for c in "abcdefghijkl"))  # 4 tokens each
    prepare(tmp_path / "out", [path], val_share=0.3)
    batch = TokenBatches(Shards(tmp_path / "out").split("train"), 8, 2, seed=0, packed=True).read([0, 1])
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12, 16]
    assert (batch.targets[0].reshape(-1, 4)[:, 3] == -100).all()  # window ends are document ends here
    assert (batch.targets[0].reshape(-1, 4)[:, :3] != -100).all()


def test_epoch_holds_every_window_once_in_a_new_order(train_file: TokenFile) -> None:
    T = 16
    batches = TokenBatches(train_file, T, 1, seed=0)
    epochs = [[starts_of(next(batches), train_file, T)[0] for _ in range(batches.windows)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(batches.windows))
    assert epochs[0] != epochs[1]
    other = TokenBatches(train_file, T, 1, seed=1)
    assert epochs[0] != [starts_of(next(other), train_file, T)[0] for _ in range(other.windows)]


def test_spread_windows_are_few_whole_and_the_same_each_time(train_file: TokenFile) -> None:
    batches = TokenBatches(train_file, 16, 4, seed=0)
    last = batches.windows - 1
    expected = [round(i * last / 9) for i in range(10)]
    for tokens in (160, 175):
        assert batches.spread(tokens) == [expected[:4], expected[4:8], expected[8:]]
        next(batches)
    assert batches.spread(1) == [[0]]
    assert list(chain(*batches.spread(10**9))) == list(range(batches.windows))


def test_ranks_share_the_batch_of_one_process(train_file: TokenFile) -> None:
    whole = TokenBatches(train_file, 8, 6, seed=0)
    ranks = [TokenBatches(train_file, 8, 2, seed=0, rank=r, world_size=3) for r in range(3)]
    for _ in range(40):  # several epochs, whose ends fall inside batches
        parts = [next(r).tokens for r in ranks]
        assert torch.equal(torch.cat(parts), next(whole).tokens)


@pytest.mark.parametrize("taken", [0, 1, 17, 60])
def test_resumed_order_is_the_same(train_file: TokenFile, taken: int) -> None:
    first = TokenBatches(train_file, 16, 3, seed=5, packed=True)
    for _ in range(taken):
        next(first)
    second = TokenBatches(train_file, 16, 3, seed=5, packed=True)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(5):
        a, b = next(first), next(second)
        assert all(torch.equal(x, y) for x, y in zip(a, b))  # type: ignore[arg-type]


def test_position_of_other_batches_is_refused(train_file: TokenFile) -> None:
    state = TokenBatches(train_file, 16, 3, seed=5).state_dict()
    with pytest.raises(ValueError, match="saved with seed 5; these batches have 6"):
        TokenBatches(train_file, 16, 3, seed=6).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with windows"):
        TokenBatches(train_file, 8, 3, seed=5).load_state_dict(state)


def test_too_few_tokens_for_a_window_are_refused(train_file: TokenFile) -> None:
    need = len(train_file)
    with pytest.raises(ValueError, match=f"has {need} tokens; one window of seq_len {need} needs {need + 1}"):
        TokenBatches(train_file, need, 1, seed=0)
    assert TokenBatches(train_file, need - 1, 1, seed=0).windows == 1


def test_rank_out_of_range_is_refused(train_file: TokenFile) -> None:
    with pytest.raises(ValueError, match=r"rank is 2; expected 0 <= rank < world_size \(2\)"):
        TokenBatches(train_file, 16, 1, seed=0, rank=2, world_size=2)


def test_bytes_of_targets_are_exact_for_bytes_and_the_mean_otherwise(train_file: TokenFile) -> None:
    targets = torch.tensor([[97, 256, -100, 98]])
    assert train_file.bytes_of(targets) == 2
    meta = train_file.meta.__class__(**{**vars(train_file.meta), "tokenizer": "other"})
    other = TokenFile(train_file.path, train_file.tokens, train_file.offsets, meta, train_file.counts)
    assert other.bytes_of(targets) == pytest.approx(3 * train_file.counts.bytes / len(train_file))


def test_damaged_folders_are_refused(folder: Path) -> None:
    def change(name: str, content: bytes | None, message: str) -> None:
        path = folder / name
        before = path.read_bytes()
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Shards(folder)
        path.write_bytes(before)

    meta = json.loads((folder / "meta.json").read_text())
    change("meta.json", None, "is no folder of token shards")
    change("meta.json", b"{", "is not JSON")
    change("meta.json", b"[]", "has shard format version None; this gdn2 reads version 1")
    change("meta.json", json.dumps(meta | {"version": 2}).encode(), "has shard format version 2")
    change("meta.json", json.dumps(meta | {"dtype": "int3"}).encode(), "is incomplete or altered")
    change("meta.json", json.dumps({k: v for k, v in meta.items() if k != "val"}).encode(), "is incomplete")
    change("train.bin", None, r"train\.bin' is missing")
    change(
        "train.bin", (folder / "train.bin").read_bytes()[:-1], r"train\.bin' has \d+ bytes, meta\.json says \d+; it is"
    )
    change("val.idx.npy", None, r"val\.idx\.npy' is missing")
    change("val.idx.npy", (folder / "val.idx.npy").read_bytes()[:-8], r"val\.idx\.npy' is truncated")
    change("train.idx.npy", b"", r"train\.idx\.npy' is truncated or no array")
    change("train.idx.npy", b"PK\3\4", r"train\.idx\.npy' is truncated or no array")
    change("val.idx.npy", (folder / "train.idx.npy").read_bytes(), r"val\.idx\.npy' does not fit meta\.json")


def test_pickled_index_is_refused(folder: Path) -> None:
    np.save(folder / "val.idx.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"val\.idx\.npy' is truncated or no array"):
        Shards(folder)


@pytest.mark.parametrize("name", ["train.bin", "train.idx.npy", "val.bin", "val.idx.npy"])
def test_full_check_finds_a_flipped_bit(folder: Path, name: str) -> None:
    Shards(folder).verify()
    data = bytearray((folder / name).read_bytes())
    data[-12] ^= 1  # within the last but one offset, so that the index still fits meta.json
    (folder / name).write_bytes(data)
    split, other = ("train", "val") if name.startswith("train") else ("val", "train")
    for splits in ((), (split,)):
        with pytest.raises(ValueError, match=f"{name}' does not match its checksum"):
            Shards(folder).verify(*splits)
    Shards(folder).verify(other)


def test_unknown_split_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="split 'test'; expected one of train, val"):
        Shards(folder).split("test")
