"""The HTTP side over the demo pair in this process, on a real port."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI

from deployments.backend import Session
from parse.pipeline import Pipeline


@dataclass
class LocalBackend:
    pipeline: Pipeline
    wrong: dict[str, str] = field(default_factory=dict)

    def session_pipeline(self, _: Session) -> Pipeline:
        return self.pipeline

    def troubles(self) -> dict[str, str]:
        return self.wrong


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
