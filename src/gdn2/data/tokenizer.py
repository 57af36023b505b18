"""Tokenizers: bytes, and any Hugging Face tokenizer behind the same few methods.

A tokenizer saves itself into a folder (`save`), and `load_tokenizer` takes that folder again: token shards and
checkpoints both carry their tokenizer, so neither needs the network or the file it first came from.
"""

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
UNFINISHED = 3  # tokens at most that a character can still wait for: it has four bytes, and a token has one or more
# Names under which published tokenizers keep their end-of-text token, tried in this order when none is declared.
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class TextStream(Protocol):
    """Turns ids into text one at a time; what it hands out is always whole, valid UTF-8."""

    def feed(self, token: int) -> str:
        """Text that became certain with this token, possibly empty."""

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""


class Tokenizer(Protocol):
    """`name` is how it was asked for; ids run from 0 to vocab_size - 1; `end_of_text` closes every document.

    `chat_template` is the Jinja text that turns a conversation into one text, None where there is none.
    """

    name: str
    vocab_size: int
    end_of_text: int
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without an end-of-text token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; end-of-text has none, and bytes that are not UTF-8 become U+FFFD."""

    def stream(self) -> TextStream: ...

    def save(self, folder: Path) -> None:
        """Write into an existing folder what `load_tokenizer(folder)` needs."""

    def definition(self) -> str:
        """All of it as text: the same for two tokenizers that turn every text into the same ids."""


class ByteTokenizer:
    """Ids 0..255 are the bytes of the text in UTF-8; 256 is end-of-text."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        stream = self.stream()
        return "".join(map(stream.feed, ids)) + stream.flush()

    def stream(self) -> "ByteStream":
        return ByteStream()

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(self.definition() + "\n", encoding="utf-8")

    def definition(self) -> str:
        return json.dumps({"gdn2": self.name})


class ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        if not 0 <= token < ByteTokenizer.vocab_size:
            raise ValueError(f"token {token} is not a byte-level id; expected 0..{ByteTokenizer.end_of_text}")
        return "" if token == ByteTokenizer.end_of_text else self._decoder.decode(bytes((token,)))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer` (`inner`); special tokens in a text are encoded as plain text, never as themselves."""

    def __init__(self, inner: Any, name: str, end_of_text: str | None = None, chat_template: str | None = None) -> None:
        vocabulary = inner.get_vocab(with_added_tokens=True)
        names = (end_of_text,) if end_of_text is not None else END_OF_TEXT_NAMES
        found = next((n for n in names if n in vocabulary), None)
        if found is None:
            raise ValueError(f"tokenizer {name!r} has no end-of-text token; expected {' or '.join(names)}")
        inner.encode_special_tokens = True
        inner.no_truncation()  # a file may ask for either, made for another use: every document is wanted whole
        inner.no_padding()
        self.inner = inner
        self.end_of_text_name = found
        self.name = name
        self.chat_template = chat_template
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.end_of_text = vocabulary[found]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.inner.decode([i for i in ids if i != self.end_of_text], skip_special_tokens=False)
        return text

    def stream(self) -> "HuggingFaceStream":
        return HuggingFaceStream(self)

    def save(self, folder: Path) -> None:
        self.inner.save(str(folder / FILE))
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        config = json.dumps({"eos_token": self.end_of_text_name} | template)
        (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")

    def definition(self) -> str:
        definition: str = self.inner.to_str()
        return definition + json.dumps({"eos_token": self.end_of_text_name})


class HuggingFaceStream:
    """Decodes a short tail of ids again with every token, since a token's text depends on its left neighbours."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last tokens that gave text, then those that have not yet
        self._spoken = 0  # how many of `_ids` gave their text already

    def feed(self, token: int) -> str:
        self._ids.append(token)
        text = self._new_text()
        certain = len(self._ids)
        if text.endswith("\ufffd"):  # the last character may be unfinished
            certain -= UNFINISHED
            if certain <= self._spoken:
                return ""
            text = self._new_text(certain)  # what is before those tokens can no longer become a character
        if text:
            self._ids, self._spoken = self._ids[self._spoken :], certain - self._spoken
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._ids, self._spoken = [], 0
        return text

    def _new_text(self, end: int | None = None) -> str:
        return self._tokenizer.decode(self._ids[:end])[len(self._tokenizer.decode(self._ids[: self._spoken])) :]


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer `spec` names: "bytes", a tokenizer.json file, a folder that holds one, or a hub name.

    A folder's tokenizer_config.json may declare `eos_token`; otherwise the usual names of that token are looked up. It,
    or a chat_template.jinja beside it, may have a chat template.
    ValueError when it cannot be read, is not on the hub or the hub cannot be reached.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        path = path / FILE
        if not path.is_file():
            raise ValueError(f"folder {str(spec)!r} holds no {FILE}")
    if path.is_file():
        return _from_file(path, str(spec))
    if path.suffix == ".json":
        raise ValueError(f"tokenizer file {str(spec)!r} does not exist")
    return _from_hub(str(spec))


def _from_file(path: Path, name: str) -> Tokenizer:
    if _read_json(path).get("gdn2") == ByteTokenizer.name:
        return ByteTokenizer()
    inner_class = _hugging_face(name)
    try:
        inner = inner_class.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"tokenizer file {str(path)!r} is not a tokenizers file: {error}") from error
    return HuggingFaceTokenizer(inner, name, *_declared(path.parent))


def _declared(folder: Path) -> tuple[str | None, str | None]:
    """The end-of-text token and the chat template that files beside a tokenizer declare."""
    config = _read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    token, template = config.get("eos_token"), config.get("chat_template")
    if (folder / TEMPLATE_FILE).is_file():  # where newer tokenizers keep it
        template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if isinstance(template, list):  # several by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return token["content"] if isinstance(token, dict) else token, template


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"tokenizer file {str(path)!r} holds {type(content).__name__}; expected an object")
    return content


def _hugging_face(name: str) -> Any:
    try:
        from tokenizers import Tokenizer as Inner
    except ImportError as error:
        raise ValueError(f"tokenizer {name!r} needs the package tokenizers: pip install 'gdn2[hf]'") from error
    return Inner


def _from_hub(name: str) -> Tokenizer:
    inner_class = _hugging_face(name)
    try:
        inner = inner_class.from_pretrained(name)
    except Exception as error:  # tokenizers raises bare Exception for every failure, the network's included
        raise ValueError(
            f"tokenizer {name!r} is neither 'bytes' nor a file or folder here, and the Hugging Face hub could not "
            f"give it (no network, or no such name): {error}"
        ) from error
    return HuggingFaceTokenizer(inner, name)
