"""What the routes share: the model, its limits, and requests made from what clients ask for."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from gdn2.data import Tokenizer
from gdn2.inference import Event, Request
from gdn2.model import LanguageModel
from gdn2.serving.chat_template import ChatTemplate
from gdn2.serving.errors import RequestError
from gdn2.serving.metrics import Metrics
from gdn2.serving.schema import Sampling
from gdn2.serving.settings import ServerSettings
from gdn2.serving.worker import BusyError, EngineWorker, Job

DEFAULT_NEW_TOKENS = 16  # OpenAI's, for completions


@dataclass
class Service:
    """A served model."""

    settings: ServerSettings
    model: LanguageModel
    tokenizer: Tokenizer
    worker: EngineWorker
    metrics: Metrics
    template: ChatTemplate | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            message = f"model is {name[:100]!r}; expected {self.settings.name!r}"
            raise RequestError(message, "model", "model_not_found", 404)

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; an empty one starts from the end-of-text token."""
        tokens = await asyncio.to_thread(self.tokenizer.encode, text)  # a long text must not hold up the others
        return tokens or [self.tokenizer.end_of_text]

    def check_prompt(self, tokens: Sequence[int]) -> None:
        most, vocab = self.settings.max_prompt_tokens, self.model.config.vocab_size
        if len(tokens) > most:
            message = f"a prompt has {len(tokens):,} tokens; expected at most {most:,}"
            raise RequestError(message, "prompt", "context_length_exceeded")
        wrong = next((token for token in tokens if not 0 <= token < vocab), None)
        if wrong is not None:
            raise RequestError(f"prompt: token is {wrong}; expected an id in [0, {vocab})", "prompt")

    def new_tokens(self, asked: int | None, default: int) -> int:
        most = self.settings.max_new_tokens
        if asked is not None and asked > most:
            raise RequestError(f"max_tokens is {asked}; expected at most {most}", "max_tokens")
        return min(default, most) if asked is None else asked

    def requests(
        self,
        body: Sampling,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> list[Request]:
        """`n` for each prompt, in order; the one at index i draws from seed + i."""
        n, vocab = body.n or 1, self.model.config.vocab_size
        if n * len(prompts) > self.worker.capacity:
            message = f"{len(prompts)} prompts by n = {n}; expected at most {self.worker.capacity} texts in one request"
            raise RequestError(message, "prompt" if len(prompts) > 1 else "n")
        for prompt in prompts:
            self.check_prompt(prompt)

        def fits(top: int | None) -> int | None:
            return None if top is None else min(top, vocab)

        return [
            Request(
                prompt,
                max(new_tokens, 1),  # of none, one is drawn and not shown
                1.0 if body.temperature is None else body.temperature,
                body.top_k or 0,
                body.top_p or 1.0,
                None if body.seed is None else (body.seed + i * n + j) % 2**63,
                body.stops,
                logprobs=fits(logprobs),
                prompt_logprobs=fits(prompt_logprobs),
            )
            for i, prompt in enumerate(prompts)
            for j in range(n)
        ]

    def submit(self, requests: Sequence[Request]) -> Job:
        """Have requests run; `BusyError` when there is no room. Whoever gets the job must enter it."""
        try:
            job = self.worker.submit(requests)
        except BusyError:
            self.metrics.rejected.labels("queue").inc()
            raise
        self.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))
        return job

    async def events(self, job: Job) -> AsyncGenerator[tuple[int, Event], None]:
        """(index of the request, event) until all have ended; TimeoutError after the server's time-out."""
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        started, heard = time.perf_counter(), set()
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    index, event = await anext(job)
            except StopAsyncIteration:
                return
            except TimeoutError:
                self.metrics.rejected.labels("timeout").inc()
                raise
            if index not in heard:
                heard.add(index)
                self.metrics.first.observe(time.perf_counter() - started)
            yield index, event
