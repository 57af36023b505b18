"""Perplexity agrees with the model's own loss, at any length."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gdn2.config import ModelConfig
from gdn2.data import Shards, prepare
from gdn2.evaluation import language
from gdn2.evaluation.language import perplexity
from gdn2.model import LanguageModel


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    records = [f"Text {i}: naïve words, {i * i} of them.\n" * (1 + i % 5) for i in range(120)]
    for i, text in enumerate(records):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    prepare(folder / "shards", [folder], val_share=0.5)
    return Shards(folder / "shards").split("val")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(
            vocab_size=257,
            d_model=16,
            mlp_width=16,
            num_layers=2,
            num_heads=1,
            key_dim=8,
            value_dim=8,
            attention_heads=1,
            cell=("mixer", "attention"),
            window=8,
        )
    ).eval()


def test_all_windows_agree_with_the_models_own_loss(model, val):
    T = 50
    score = perplexity(model, val, T, len(val), "cpu")
    whole = (len(val) - 1) // T
    text = torch.from_numpy(val.tokens[: whole * T + 1].astype(np.int64))
    with torch.inference_mode():
        nats = model.loss(text[:-1].view(-1, T), text[1:].view(-1, T), reduction="none").double()
    targets = text[1:].view(-1, T)
    assert score.tokens == whole * T
    # float32 sums in another order
    assert score.nats == pytest.approx(nats.mean().item(), rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(nats.mean().item()), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(
        nats.sum().item() / math.log(2) / (targets < 256).sum().item(), rel=1e-6
    )
    assert [(b.start, b.stop) for b in score.by_position] == [(0, 16), (16, 32), (32, 50)]
    for bucket in score.by_position:
        part = slice(bucket.start, bucket.stop)
        assert bucket.nats == pytest.approx(nats[:, part].mean().item(), rel=1e-6)
        bits = nats[:, part].sum().item() / math.log(2) / (targets[:, part] < 256).sum().item()
        assert bucket.bits_per_byte == pytest.approx(bits, rel=1e-6)


def test_pieces_of_a_long_window_score_as_the_whole(model, val, monkeypatch):
    whole = perplexity(model, val, 300, 900, "cpu")
    monkeypatch.setattr(language, "FORWARD_TOKENS", 37)
    pieces = perplexity(model, val, 300, 900, "cpu")
    assert pieces.nats == pytest.approx(whole.nats, rel=1e-5)  # the split sequence agrees to float32 rounding
    assert [b.nats for b in pieces.by_position] == pytest.approx([b.nats for b in whole.by_position], rel=1e-5)


def test_packed_scores_are_those_of_the_documents_alone(model, val):
    """Every document of the two windows, cut at the windows' ends, read by itself from an empty state."""
    T = 600  # each window holds several documents
    score = perplexity(model, val, T, 2 * T, "cpu", packed=True)
    windows = (len(val) - 1) // T
    nats, places = [], []
    for first in (0, (windows - 1) * T):
        cuts = [first, *(int(o) for o in val.offsets if first < o < first + T), first + T]
        assert len(cuts) > 4
        for start, stop in pairwise(cuts):
            end = stop if stop in val.offsets else stop + 1  # the token after a cut document is its last target
            text = torch.from_numpy(val.tokens[start:end].astype(np.int64))[None]
            with torch.inference_mode():
                nats += model.loss(text[:, :-1], text[:, 1:], reduction="none")[0].tolist()
            places += range(start - first, start - first + text.shape[1] - 1)
    assert score.tokens == len(nats) < 2 * T
    assert score.nats == pytest.approx(sum(nats) / len(nats), rel=1e-5)  # float32 sums in another order
    for bucket in score.by_position:
        part = [n for n, place in zip(nats, places) if bucket.start <= place < bucket.stop]
        assert bucket.nats == pytest.approx(sum(part) / len(part), rel=1e-5)


def test_bucket_without_a_target_is_left_out(model, tmp_path):
    documents = (f"sixteen bytes: {c}" for c in "abcdefghijklmnop")
    prepare(tmp_path / "shards", documents={"all": documents}, val_share=0.5)
    score = perplexity(model, Shards(tmp_path / "shards").split("val"), 17, 51, "cpu", packed=True)
    assert score.tokens == 3 * 16  # the last place of each window is its document's end
    assert [(b.start, b.stop) for b in score.by_position] == [(0, 16)]


def test_windows_are_the_same_at_every_call_apart_and_spread(val):
    read = []

    class Uniform(torch.nn.Module):
        config = SimpleNamespace(vocab_size=257)

        def forward(self, tokens, state):
            read.append(tokens)
            return tokens, None

        def logits(self, hidden):
            return torch.zeros(*hidden.shape, 257)

    score = perplexity(Uniform(), val, 20, 100, "cpu")
    assert score.tokens == 100
    assert score.nats == pytest.approx(math.log(257))
    first = torch.cat(read)
    read.clear()
    done = []
    perplexity(Uniform(), val, 20, 119, "cpu", progress=lambda *counts: done.append(counts))
    assert torch.equal(torch.cat(read), first)
    assert done[-1] == (100, 100)
    tokens = val.tokens.tolist()
    whole = (len(tokens) - 1) // 20
    assert first.tolist() == [tokens[s : s + 20] for s in (20 * round(i * (whole - 1) / 4) for i in range(5))]


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_comes_back(model, val, training):
    model.train(training)
    perplexity(model, val, 20, 20, "cpu")
    assert model.training == training


def test_one_end_of_text_target_has_no_bits_per_byte(model, val):
    ending = SimpleNamespace(tokens=np.array([97, 256], np.uint16), meta=val.meta, bytes_of=val.bytes_of)

    class File(SimpleNamespace):
        def __len__(self):
            return 2

    assert perplexity(model, File(**vars(ending)), 1, 1, "cpu").bits_per_byte is None


@pytest.mark.parametrize(
    ("seq_len", "tokens", "message"),
    [
        (0, 10, "seq_len is 0; expected an integer >= 1"),
        (10, 0, "tokens is 0; expected an integer >= 1"),
        (10**6, 10, r"val.bin' has \d+ tokens; one window of seq_len 1000000 needs 1000001"),
    ],
)
def test_bad_arguments_are_named(model, val, seq_len, tokens, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, val, seq_len, tokens, "cpu")


def test_text_of_a_larger_vocabulary_is_refused(model, val):
    small = LanguageModel(ModelConfig(vocab_size=256, d_model=8, mlp_width=8, num_layers=1, num_heads=1))
    with pytest.raises(ValueError, match="the text's vocabulary has 257 tokens, the model's 256"):
        perplexity(small, val, 10, 10, "cpu")


def test_a_loss_that_is_no_number_is_an_error(model, val):
    with torch.no_grad():
        kept = model.norm.weight.clone()
        model.norm.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="the mean loss is nan nats; expected a number < 700"):
            perplexity(model, val, 10, 10, "cpu")
        model.norm.weight.copy_(kept)
