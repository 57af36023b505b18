import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdn2.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

TEXT = "naïve 東京 🦊\x00\r\n <|endoftext|> the quick"


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe_file: Path) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else str(bpe_file))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.feed, ids), stream.flush()]


def test_round_trip_is_exact(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_text_cannot_forge_end_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_text not in tokenizer.encode("a<|endoftext|>b")


def test_end_of_text_has_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.end_of_text, *tokenizer.encode("c")]) == "abc"


def test_stream_joins_to_decode_and_never_splits_a_character(tokenizer: Tokenizer) -> None:
    parts = streamed(tokenizer, tokenizer.encode(TEXT))
    assert "".join(parts) == TEXT
    assert "\ufffd" not in "".join(parts)
    assert sum(map(bool, parts)) > 5  # it did not all come with the flush


def test_unfinished_character_is_flushed_as_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦊")[:-1]
    assert "".join(streamed(tokenizer, ids)) == "a\ufffd"


def test_stream_of_broken_characters_does_not_wait_for_ever(bpe_file: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_file))
    (lead, *_) = tokenizer.encode("🦊")
    if tokenizer.decode([lead]) != "\ufffd":
        pytest.skip("this tokenizer has no token that is part of a character")
    stream = tokenizer.stream()
    parts = [stream.feed(lead) for _ in range(200)]
    assert sum(map(len, parts)) >= 190
    assert len(stream._ids) < 10  # each step decodes what waits: without an end, ever more
    assert "".join(parts) + stream.flush() == "\ufffd" * 200
    whole = [lead] * 6 + tokenizer.encode("🦊 naïve")
    assert "".join(streamed(tokenizer, whole)) == "\ufffd" * 6 + "🦊 naïve"


@given(st.lists(st.integers(0, 256)))
def test_any_bytes_stream_to_valid_utf8(ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    text = "".join(streamed(tokenizer, ids))
    assert text.encode("utf-8").decode("utf-8") == text == tokenizer.decode(ids)


def test_byte_ids_are_the_bytes() -> None:
    assert ByteTokenizer().encode("é") == list("é".encode())
    assert (ByteTokenizer.vocab_size, ByteTokenizer.end_of_text) == (257, 256)


def test_saved_tokenizer_loads_from_its_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)


def test_truncation_and_padding_of_a_file_are_off(bpe_file: Path, tmp_path: Path) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(bpe_file))
    inner.enable_truncation(4)
    inner.enable_padding(length=32)
    inner.save(str(tmp_path / "tokenizer.json"))
    for text in (TEXT, "a"):
        assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(str(bpe_file)).encode(text)


def test_definition_tells_tokenizers_apart(bpe_file: Path, tmp_path: Path) -> None:
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    for folder in (first, again, other):
        folder.mkdir()
    load_tokenizer(str(bpe_file)).save(first)
    load_tokenizer(first).save(again)
    assert load_tokenizer(again).definition() == load_tokenizer(first).definition()
    (other / "tokenizer.json").write_text(bpe_file.read_text().replace('"~":', '"unheard":'))
    assert load_tokenizer(other).vocab_size == load_tokenizer(first).vocab_size
    assert load_tokenizer(other).definition() != load_tokenizer(first).definition()
    (again / "tokenizer_config.json").write_text('{"eos_token": "the"}')
    assert load_tokenizer(again).definition() != load_tokenizer(first).definition()
    assert load_tokenizer("bytes").definition() != load_tokenizer(first).definition()


def test_declared_end_of_text_is_used(bpe_file: Path, tmp_path: Path) -> None:
    load_tokenizer(str(bpe_file)).save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for eos in ("the", {"content": "the"}):
        config.write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(tmp_path).end_of_text == load_tokenizer(tmp_path).encode("the")[0]
    config.write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(ValueError, match="has no end-of-text token; expected <none>"):
        load_tokenizer(tmp_path)


def test_byte_stream_refuses_other_ids() -> None:
    with pytest.raises(ValueError, match=r"token 257 is not a byte-level id; expected 0\.\.256"):
        ByteTokenizer().decode([257])


def test_bad_tokenizer_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.json' does not exist"):
        load_tokenizer(tmp_path / "no.json")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list; expected an object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizers file"):
        load_tokenizer(tmp_path)


def test_unreachable_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers

    class Offline:
        @staticmethod
        def from_pretrained(name: str) -> None:
            raise Exception(f"no route to host, asking for {name}")

    monkeypatch.setattr(tokenizers, "Tokenizer", Offline)
    with pytest.raises(ValueError, match=r"org/name.*hub could not give it.*no route to host"):
        load_tokenizer("org/name")


def test_hub_name_is_fetched(monkeypatch: pytest.MonkeyPatch, bpe_file: Path) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(bpe_file))

    class Hub:
        @staticmethod
        def from_pretrained(name: str) -> object:
            return inner

    monkeypatch.setattr(tokenizers, "Tokenizer", Hub)
    assert load_tokenizer("org/name").name == "org/name"
    assert load_tokenizer("org/name").decode(load_tokenizer("org/name").encode("fox")) == "fox"


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, bpe_file: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    for spec in ("org/name", str(bpe_file)):
        with pytest.raises(ValueError, match=f"{spec!r} needs the package tokenizers"):
            load_tokenizer(spec)
