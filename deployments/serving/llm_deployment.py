"""Calls to a deployment of Ray Serve LLM, through its handle instead of HTTP.

UNTESTED with a real Ray Serve LLM in the automated tests: it is written from the source code of Ray 2.60, and tested
with a deployment that has the same methods. It has been tried once by hand, on CPUs.
`parse/engines/remote/ray_serve_llm.py` writes the requests and reads the responses.
"""

import asyncio
import json
import pkgutil
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RaySystemError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.serving.calls import NO_REQUEST, await_result, call_replica, stream_items
from parse.engines.remote.errors import ServerUnavailable
from parse.engines.remote.ray_serve_llm import LLM_CONFIG
from parse.engines.remote.server import MAX_ERROR_CHARACTERS, error_message, error_of_status
from parse.engines.remote.vllm import COMPLETIONS
from parse.errors import RequestError, ServerError

REQUEST_CLASS = "ray.serve.llm.openai_api_models:CompletionRequest"


@dataclass(frozen=True)
class DeploymentAddress:
    """A deployment in this Ray cluster, and how it is called."""

    application: str
    deployment: str
    stall_timeout_s: float

    def open(self) -> "LLMDeployment":
        handle: DeploymentHandle = serve.get_deployment_handle(self.deployment, self.application, _check_exists=False)
        if not handle.is_initialized:
            # Its router runs in a loop of its own, because the calls of a check and later calls have different loops.
            handle._init(_run_router_in_separate_loop=True)
        return LLMDeployment(self, handle)


class LLMDeployment:
    """Implements `Transport`. Calls may be made at the same time, in any event loop."""

    def __init__(self, address: DeploymentAddress, handle: DeploymentHandle, session_key: str = "") -> None:
        self.url = f"deployment {address.application}/{address.deployment}"
        self._address, self._handle, self._session_key = address, handle, session_key

    def for_session(self, session_key: str) -> "LLMDeployment":
        """Returns a client whose calls go to one replica, if the deployment's router honours sessions.

        `multiplexed_model_id` has this effect with Serve's default router, but Ray Serve LLM takes it for a LoRA
        adapter.
        """
        return LLMDeployment(self._address, self._handle, session_key)

    async def get_json(self, path: str) -> Any:
        if path == "/version":
            return {"version": ray.__version__}  # all processes of a cluster have the same
        if path == LLM_CONFIG:
            return describe_llm_config(await self._call("llm_config"))
        raise _missing(path)

    async def get_text(self, path: str) -> str:
        if path != "/health":
            raise _missing(path)
        await self._call("check_health")
        return ""

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Raises ServerError, because the response could not be read without vLLM. The dialect streams instead."""
        raise _missing(f"{path} without a stream")

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any]:
        if path != COMPLETIONS:
            raise _missing(path)
        # Serve's request id would be the same for all calls of an answer, and vLLM needs different ones.
        request = PickledRequest({**body, "stream": True, "request_id": f"parse-{uuid.uuid4().hex}"})
        is_complete = False
        async with aclosing(self._stream("completions", request)) as items:
            async for item in items:
                for event in read_events(item):
                    yield event
                is_complete = is_complete or ends_stream(item)
        if not is_complete:
            raise ServerUnavailable("the stream ended early", interrupted=True)

    def close(self) -> None:
        """The handle belongs to the process, which may have other users of it."""

    async def aclose(self) -> None:
        self.close()

    async def _call(self, method: str) -> Any:
        with self._translated_errors():
            async with asyncio.timeout(self._address.stall_timeout_s):
                handle = self._handle.options(method_name=method, session_id=self._session_key)
                return await await_result(call_replica(handle, NO_REQUEST))

    async def _stream(self, method: str, request: "PickledRequest") -> AsyncGenerator[Any]:
        with self._translated_errors():
            handle = self._handle.options(method_name=method, session_id=self._session_key, stream=True)
            async with aclosing(stream_items(call_replica(handle, NO_REQUEST, request))) as items:
                while True:
                    async with asyncio.timeout(self._address.stall_timeout_s):
                        try:
                            item = await anext(items)
                        except StopAsyncIteration:
                            return
                    yield item

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except (ServerUnavailable, ServerError, RequestError):
            raise
        except TimeoutError as error:
            message = f"it sent nothing for {self._address.stall_timeout_s:g} s"
            raise ServerUnavailable(message) from error
        except Exception as error:
            raise translate_error(error) from error


class PickledRequest:
    """The body of a completion. The replica that receives it gets a `CompletionRequest` of Ray Serve LLM instead.

    That class needs vLLM, which the environment of the caller may lack.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = dict(body)

    @property
    def prompt(self) -> str:
        """A text that begins like that of another prompt with the same first tokens.

        Ray Serve LLM's `PrefixCacheAffinityRouter` compares it before the request is sent. Prompts of one call share
        their beginning, so the first one stands for all.
        """
        prompt = self._body["prompt"]
        if isinstance(prompt, str):
            return prompt
        token_ids = prompt[0] if prompt and isinstance(prompt[0], list) else prompt
        return " ".join(map(str, token_ids))

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return methodcaller("model_validate", self._body), (_ImportedWhenUnpickled(REQUEST_CLASS),)


class _ImportedWhenUnpickled:
    """Becomes what is at an import path when it is unpickled."""

    def __init__(self, import_path: str) -> None:
        self._import_path = import_path

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return pkgutil.resolve_name, (self._import_path,)


def read_events(item: Any) -> list[Any]:
    """Returns the events in an item of the stream, which is a text, an error, or a list of them."""
    events = []
    for part in _parts(item):
        if not isinstance(part, str):
            raise _error_of_response(part)
        for line in part.split("\n"):  # splitlines() also splits at characters that JSON may contain
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            try:
                event = json.loads(data)
            except ValueError:
                raise ServerUnavailable(f"the server sent no JSON: {data[:80]!r}", deterministic=True) from None
            if isinstance(event, Mapping) and "error" in event:
                raise ServerUnavailable(error_message(event), deterministic=True)
            events.append(event)
    return events


def ends_stream(item: Any) -> bool:
    """Returns whether an item contains the last event of a stream."""
    return any(isinstance(part, str) and "data: [DONE]" in map(str.strip, part.split("\n")) for part in _parts(item))


def _parts(item: Any) -> Sequence[Any]:
    return item if isinstance(item, list) else [item]


def _error_of_response(response: Any) -> Exception:
    """Returns the error to raise for an `ErrorResponse` of Ray Serve LLM."""
    error = getattr(response, "error", None)
    if error is None:
        return ServerError(f"the deployment answered with {type(response).__name__} instead of a stream")
    try:
        return error_of_status(int(error.code), error_message(str(error.message)))
    except (AttributeError, TypeError, ValueError):
        return ServerUnavailable(f"the deployment answered with the error {error!r}", deterministic=True)


def translate_error(error: Exception) -> Exception:
    """Returns the error to raise for a call that failed."""
    message = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")[:MAX_ERROR_CHARACTERS]
    match error:
        case RayActorError() | TaskCancelledError():
            return ServerUnavailable(message, interrupted=True)
        case BackPressureError():
            return ServerUnavailable(message, retry_after_s=error.retry_after_s or 0.0)
        case DeploymentUnavailableError():
            return ServerUnavailable(message)
        case RaySystemError(client_exc=ImportError() as missing):
            return translate_error(missing)
        case ImportError():
            return ServerError(
                f"{message}. The deployment or this replica has received an object that it cannot read without it. It "
                "is probably an error, which the log of the deployment shows"
            )
    return ServerUnavailable(message, deterministic=True)


def describe_llm_config(config: Any) -> dict[str, Any]:
    """Returns the parts of an `LLMConfig` that this project uses."""
    try:
        source = config.model_loading_config.model_source
        return {
            "model_id": config.model_id,
            "model_source": source if isinstance(source, str) else None,
            "engine_kwargs": dict(config.engine_kwargs),
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ServerError(f"the settings of the deployment are not as expected: {error}") from error


def _missing(call: str) -> ServerError:
    return ServerError(f"the handle of a deployment has no {call}")
