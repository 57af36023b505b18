"""Bodies of requests and responses, as OpenAI's API has them, and no others: an unknown field is an error.

A field that OpenAI has and this server cannot honour takes only the value that asks for nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_CHOICES = 128  # `n`
MAX_TOP = 20  # alternatives with log-probabilities
INT64 = 2**63


def _valid(text: str) -> str:
    """JSON can spell half a character."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text has a lone surrogate; expected whole characters")
    return text


def _whole(value: object) -> object:
    """To JSON 3.0 is the integer 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
TokenId = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
Text = Annotated[str, AfterValidator(_valid)]
StopString = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_valid)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False


class Sampling(Body):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="The served model's name, or nothing.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = Field(
        None, description="Texts for each prompt; 1 unless given."
    )
    max_tokens: Annotated[int, Field(ge=0, lt=INT64), WHOLE] | None = Field(None, description="New tokens at most.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token; 1 unless given.")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample among the likeliest that reach it.")
    top_k: Annotated[int, Field(ge=0, lt=INT64), WHOLE] | None = Field(
        None, description="Sample among the k likeliest; not of OpenAI's API."
    )
    seed: Annotated[int, WHOLE] | None = Field(None, description="The same seed gives the same texts.")
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = Field(
        None, description="Texts before which to end."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Not used.")
    frequency_penalty: Zero | None = Field(None, description="Only 0.")
    presence_penalty: Zero | None = Field(None, description="Only 0.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="Only empty.")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Sampling):
    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
        | None
    ) = Field(None, description="Texts or token ids; the end-of-text token unless given.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP), WHOLE] | None = Field(
        None, description="Alternatives told with each token."
    )
    echo: bool | None = Field(None, description="Give the prompt back before its continuation.")
    best_of: Literal[1] | None = Field(None, description="Only 1.")
    suffix: None = None


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64), WHOLE] | None = Field(
        None, description="The same as max_tokens."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP), WHOLE] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "failed"]
