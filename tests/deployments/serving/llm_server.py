"""A deployment with the methods of Ray Serve LLM's `LLMServer`, as the source code of Ray 2.60 describes them.

It is no Ray Serve LLM: it shows that the client follows the description, and not that the description is right. It
passes completions on to a server that speaks vLLM's HTTP API.
"""

import asyncio
import json
import os
import pickle
import pkgutil
import sys
from collections.abc import AsyncGenerator
from types import ModuleType
from typing import Any
from uuid import uuid4

import aiohttp
from pydantic import BaseModel, ConfigDict, Field
from ray import cloudpickle
from ray.exceptions import ActorDiedError

REQUEST_MODULE = "ray.serve.llm.openai_api_models"
BATCH_INTERVAL_S = 0.01


class CompletionRequest(BaseModel):
    """The fields that are checked here. vLLM's request has many more, and allows others too."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: list[int] | list[list[int]] | str
    max_tokens: int = 16
    stream: bool = False
    request_id: str = Field(default_factory=lambda: uuid4().hex)


class ErrorInfo(BaseModel):
    message: str
    type: str
    code: int


class ErrorResponse(BaseModel):
    error: ErrorInfo


class UnreadableErrorResponse:
    """Is pickled as an object of vLLM, which an environment without vLLM cannot read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pkgutil.resolve_name, ("vllm.entrypoints.serve.engine.protocol:ErrorResponse",)


Chunk = str | ErrorResponse | UnreadableErrorResponse


def provide_request_class() -> None:
    """Provides the class where Ray Serve LLM has it. The real module cannot be imported without vLLM."""
    module: Any = ModuleType(REQUEST_MODULE)
    module.CompletionRequest = CompletionRequest
    sys.modules[REQUEST_MODULE] = module


class LLMServer:
    def __init__(self, url: str, llm_config: Any = None, *, readable_errors: bool = True) -> None:
        """`llm_config` is what the method of this name returns. If it is an exception, the method raises it."""
        provide_request_class()
        self._url, self._config, self._readable_errors = url, llm_config, readable_errors

    async def llm_config(self) -> Any:
        if isinstance(self._config, Exception):
            raise self._config
        return self._config

    async def check_health(self) -> None:
        async with aiohttp.ClientSession() as session, session.get(f"{self._url}/health") as response:
            response.raise_for_status()

    async def completions(
        self, request: CompletionRequest, raw_request_info: Any = None
    ) -> AsyncGenerator[list[Chunk]]:
        """Returns a generator and is none itself, like the real method."""
        assert type(request) is CompletionRequest and request.stream, request
        return self._batch_output_stream(self._complete(request))

    async def pid(self) -> int:
        """The real class has no such method."""
        return os.getpid()

    async def _complete(self, request: CompletionRequest) -> AsyncGenerator[Chunk]:
        body = request.model_dump() | {"replica": os.getpid()}
        async with (
            aiohttp.ClientSession(read_bufsize=2**23) as session,
            session.post(f"{self._url}/v1/completions", json=body) as response,
        ):
            if response.status != 200:
                message = json.loads(await response.text())["error"]["message"]
                error = ErrorResponse(error=ErrorInfo(message=message, type="Error", code=response.status))
                yield error if self._readable_errors else UnreadableErrorResponse()
                return
            async for line in response.content:
                if line.strip():
                    yield f"{line.decode().strip()}\n\n"

    async def _batch_output_stream(self, items: AsyncGenerator[Chunk]) -> AsyncGenerator[list[Chunk]]:
        """Yields lists of the items of a short time."""
        waiting: asyncio.Queue[Chunk] = asyncio.Queue()

        async def read() -> None:
            async for item in items:
                waiting.put_nowait(item)

        reading = asyncio.create_task(read())
        try:
            while True:
                await asyncio.wait([reading], timeout=BATCH_INTERVAL_S)
                is_done = reading.done()
                if batch := [waiting.get_nowait() for _ in range(waiting.qsize())]:
                    yield batch
                if is_done:
                    reading.result()
                    return
        finally:
            reading.cancel()


class LocalHandle:
    """A handle to a deployment in this process. Arguments and results are pickled, as between two processes."""

    def __init__(self, server: Any, options: dict[str, Any] | None = None) -> None:
        self._server, self._options = server, options or {}

    def options(self, **options: Any) -> "LocalHandle":
        return LocalHandle(self._server, options)

    def remote(self, *args: Any) -> "LocalResponse":
        method = getattr(self._server, self._options["method_name"])
        return LocalResponse(method(*pickle.loads(cloudpickle.dumps(args))))


class LocalResponse:
    def __init__(self, call: Any) -> None:
        self._call = asyncio.ensure_future(call)

    def __await__(self) -> Any:
        return self._call.__await__()

    async def __anext__(self) -> Any:
        try:
            return pickle.loads(cloudpickle.dumps(await anext(await asyncio.shield(self._call))))
        except aiohttp.ClientError:  # the server has ended, and a real one is in the process of the replica
            raise ActorDiedError() from None

    def cancel(self) -> None:
        if not self._call.done():
            self._call.cancel()
        elif self._call.exception() is None and hasattr(self._call.result(), "aclose"):
            self._closing = asyncio.ensure_future(self._call.result().aclose())
