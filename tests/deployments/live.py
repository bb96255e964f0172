"""Serves the HTTP API on a real port, with a pipeline in this process."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI

from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metrics import ROUTER_METRICS, MetricsRecorder
from deployments.session import Session
from parse.pipeline import Pipeline
from parse.requests import GenerateRequest
from parse.types import SpeculationStats, TokenDelta

PATIENCE_S = 20


@dataclass
class LocalBackend:
    pipeline: Pipeline
    wrong: dict[str, str] = field(default_factory=dict)
    recorder: MetricsRecorder = field(default_factory=lambda: MetricsRecorder(ROUTER_METRICS, deployment="Router"))

    def pipeline_for_session(self, _: Session) -> Pipeline:
        return self.pipeline

    def unavailable_parts(self) -> dict[str, str]:
        return self.wrong

    async def deployment_failure(self) -> str | None:
        return None

    def update_metrics(self) -> None:
        pass

    async def collect_peer_metrics(self) -> list[ReplicaMetrics]:
        return []


def without_methods(pipeline: Pipeline) -> Pipeline:
    """Returns the pipeline of a target without token-level methods."""
    return replace(pipeline, capabilities=replace(pipeline.capabilities, speculative_methods=()))


@contextmanager
def served(app: FastAPI, *, log_level: str = "warning") -> Iterator[str]:
    """Serves an app and yields its address."""
    # The socket is bound here, so that the port is known at once and early requests wait in its backlog.
    with socket.create_server(("127.0.0.1", 0)) as port:
        config = uvicorn.Config(app, log_level=log_level, log_config=None, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[port]), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def connected(address: str, body: bytes, *, length: int | None = None) -> Iterator[socket.socket]:
    """Connects a client that sends a chat request, or only the first part of one of this length."""
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=PATIENCE_S) as client:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
        yield client


@dataclass
class Writer:
    """A verifier that generates some tokens, and then fails or waits.

    It waits until `may_go_on` is set.
    """

    tokens: Sequence[int] = ()
    error: Exception | None = None
    speculated: SpeculationStats | None = None  # the number of these tokens
    may_go_on: threading.Event = field(default_factory=threading.Event)
    busy: int = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        self.busy += 1
        try:
            if self.tokens:
                yield TokenDelta(tuple(self.tokens), speculation=self.speculated)
            if self.error is not None:
                raise self.error
            while not self.may_go_on.is_set():
                await asyncio.sleep(0.005)
            yield TokenDelta((300,), finish_reason="stop")
        finally:
            self.busy -= 1


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)
