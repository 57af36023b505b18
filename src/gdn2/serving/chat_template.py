"""Chat messages as tokens, by the Jinja template that a tokenizer carries, run in a sandbox."""

from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gdn2.data import Tokenizer
from gdn2.data.tokenizer import HuggingFaceTokenizer


class ChatTemplate:
    """A template as Hugging Face's tokenizers have it.

    The template's special tokens are encoded as themselves. A message that contains the text of one is refused: it
    would be taken for the end of the message.

    ValueError for a text that is no template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not Jinja: {error}") from error
        self._tokenizer = tokenizer
        self._special: list[str] = []
        self._inner: Any = None
        self._variables = {"bos_token": "", "eos_token": ""}
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._inner = type(tokenizer.inner).from_str(tokenizer.inner.to_str())
            self._inner.encode_special_tokens = False
            added = self._inner.get_added_tokens_decoder().values()
            self._special = [token.content for token in added if token.special]
            self._variables = dict.fromkeys(self._variables, tokenizer.end_of_text_name)

    def encode(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of (role, text) pairs and of the opening of the answer; ValueError where the template refuses."""
        for _, text in messages:
            found = next((token for token in self._special if token in text), None)
            if found is not None:
                raise ValueError(f"a message contains the special token {found!r}; expected plain text")
        try:
            text = self._template.render(
                messages=[{"role": role, "content": text} for role, text in messages],
                add_generation_prompt=True,
                **self._variables,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error
        if self._inner is None:
            return self._tokenizer.encode(text)
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
