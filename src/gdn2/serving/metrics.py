"""Prometheus metrics of a server; their names are listed in docs/serving.md."""

import time
from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gdn2.inference import Event
from gdn2.serving.worker import EngineWorker

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.answers = Counter(
            "gdn2_http_responses", "Responses by route and status.", ("route", "status"), registry=registry
        )
        self.rejected = Counter(
            "gdn2_rejected", "Requests turned away or given up, by reason.", ("reason",), registry=registry
        )
        self.finished = Counter(
            "gdn2_texts", "Texts that ended, by reason (stop, length, cancelled).", ("reason",), registry=registry
        )
        self.prompt_tokens = Counter("gdn2_prompt_tokens", "Tokens of accepted prompts.", registry=registry)
        self.new_tokens = Counter("gdn2_new_tokens", "Tokens generated.", registry=registry)
        self.first = Histogram(
            "gdn2_first_token_seconds", "From a request to its first token.", buckets=LATENCIES, registry=registry
        )
        self.whole = Histogram(
            "gdn2_response_seconds", "From a request to the end of its answer.", buckets=LATENCIES, registry=registry
        )
        self.steps = Histogram("gdn2_step_seconds", "A step of the engine.", buckets=STEPS, registry=registry)

    def watch(self, worker: EngineWorker) -> None:
        """Tell the worker's state with every reading."""
        for name, text, read in (
            ("gdn2_active_requests", "Requests that run or wait.", lambda: worker.active),
            ("gdn2_slots", "Texts that can run at a time.", lambda: worker.slots),
            ("gdn2_state_bytes", "Bytes of the state of all slots.", lambda: worker.state_bytes),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def stepped(self, seconds: float, events: Sequence[Event]) -> None:
        self.steps.observe(seconds)
        self.new_tokens.inc(sum(event.token is not None for event in events))
        for event in events:
            if event.finish is not None:
                self.finished.labels(event.finish).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class Observed:
    """ASGI middleware that counts and times responses. Paths without a route count as one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        route, started = scope["path"] if scope["path"] in self.routes else "other", time.perf_counter()
        status = "none"  # the client went away before there was one

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            self.metrics.answers.labels(route, status).inc()
            if scope["method"] == "POST":
                self.metrics.whole.observe(time.perf_counter() - started)
        return None
