"""The routes."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

import gdn2
from gdn2.data import Tokenizer
from gdn2.inference import Engine
from gdn2.model import LanguageModel
from gdn2.serving import schema
from gdn2.serving.chat import chat
from gdn2.serving.chat_template import ChatTemplate
from gdn2.serving.completions import complete
from gdn2.serving.errors import ErrorBody, RequestError, refuse
from gdn2.serving.limits import Gate
from gdn2.serving.metrics import Metrics, Observed
from gdn2.serving.page import page
from gdn2.serving.service import Service
from gdn2.serving.settings import ServerSettings
from gdn2.serving.streams import ClientGoneError
from gdn2.serving.view import ViewRequest, describe, view
from gdn2.serving.worker import BusyError, EngineError, EngineWorker

CLIENT_GONE = 499  # what web servers log for it; nobody receives it


def _fails(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


ASKED = _fails(400, 401, 404, 408, 413, 429, 500, 503, 504)
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
STREAMED = {"text/event-stream": {"schema": EVENT}}
PLAIN: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def create_app(
    settings: ServerSettings,
    model: LanguageModel,
    tokenizer: Tokenizer,
    make_engine: Callable[[], Engine],
    chat_template: str | None = None,
    around: AbstractContextManager[Any] | None = None,
) -> ASGIApp:
    """The server as an ASGI application, whose lifespan is the engine's.

    Args:
        model: in evaluation mode; from then on the engine's thread alone runs it.
        make_engine: builds an engine of that model and tokenizer.
        chat_template: Jinja text for /v1/chat/completions; None means that there is no chat.
        around: entered in the engine's thread, such as an autocast.

    Raises:
        ValueError: a chat template that is none.
    """
    metrics = Metrics()
    worker = EngineWorker(make_engine, settings.queue, around, metrics.stepped)
    metrics.watch(worker)
    template = None if chat_template is None else ChatTemplate(chat_template, tokenizer)
    service = Service(settings, model, tokenizer, worker, metrics, template)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await worker.start()
        yield
        await worker.stop()

    app = FastAPI(title="gdn2", version=gdn2.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    # What is named here is answered and no more; anything else is also logged, and ends the connection.
    expected = (HTTPException, RequestValidationError, RequestError, BusyError, EngineError, TimeoutError)
    for kind in (*expected, Exception):
        app.exception_handler(kind)(refuse)

    @app.exception_handler(ClientGoneError)
    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    routes(app, service)
    paths = [getattr(route, "path", "") for route in app.routes]
    gate = Gate(app, settings, lambda reason: metrics.rejected.labels(reason).inc())
    return Observed(gate, metrics, paths)


def routes(app: FastAPI, service: Service) -> None:
    """Every path of the server."""
    settings, metrics = service.settings, service.metrics
    front = page()
    about = {"id": settings.name, "object": "model", "created": service.created, "owned_by": "gdn2"}

    @app.get("/", include_in_schema=False)
    async def root() -> HTMLResponse:
        return front

    @app.get("/health", response_model=schema.Health, responses={503: {"model": schema.Health}})
    async def health() -> JSONResponse:
        """Whether the engine runs."""
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics", response_class=Response, responses=PLAIN | _fails(401))
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", response_model=schema.ModelList, responses=_fails(401))
    async def models() -> JSONResponse:
        """The one model."""
        return JSONResponse({"object": "list", "data": [about]})

    @app.get("/v1/models/{name}", response_model=schema.Model, responses=_fails(401, 404))
    async def one_model(name: str) -> JSONResponse:
        """The model by its name."""
        service.check_model(name)
        return JSONResponse(about)

    @app.post(
        "/v1/completions",
        response_model=schema.Completion,
        responses=ASKED | {200: {"model": schema.Completion, "content": STREAMED}},
    )
    async def completions(body: schema.CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        return await complete(service, body, request.receive)

    @app.post(
        "/v1/chat/completions",
        response_model=schema.ChatCompletion,
        responses=ASKED | {200: {"model": schema.ChatCompletion, "content": STREAMED}},
    )
    async def chat_completions(body: schema.ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await chat(service, body, request.receive)

    @app.get("/view", responses=_fails(401))
    async def view_of_the_model() -> dict[str, Any]:
        """What the page at / needs to know."""
        return describe(service)

    @app.post("/view", response_class=Response, responses=ASKED | {200: {"content": STREAMED}})
    async def view_of_a_text(body: ViewRequest) -> Response:
        """Continue a prompt, with what each token did to the memory."""
        return await view(service, body)
