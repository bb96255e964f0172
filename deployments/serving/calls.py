"""Calls over Ray Serve's handles: each stands alone, ends with its caller, and raises what was raised there."""

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context, attach
from ray import serve
from ray.exceptions import RayTaskError, TaskCancelledError
from ray.serve.context import _RequestContext
from ray.serve.handle import DeploymentHandle

from deployments.observability.tracing import tracer
from deployments.session import Session
from parse.events import StageName
from parse.types import TokenDelta

SERVE_REQUEST_CONTEXT: contextvars.ContextVar[Any] = serve.context._serve_request_context


@dataclass(frozen=True)
class CallContext:
    """What a call is a part of."""

    request_id: str = ""  # for the log of the replica
    trace_context: Context | None = None

    def activate(self) -> None:
        SERVE_REQUEST_CONTEXT.set(_RequestContext(request_id=self.request_id))
        if self.trace_context is not None:
            attach(self.trace_context)


NO_REQUEST = CallContext()


@contextmanager
def trace_stage(name: StageName, session: Session) -> Iterator[CallContext]:
    """A span in the trace of an answer. It is handed on by hand: what runs here changes from task to task."""
    span = tracer.start_span(name, session.trace_context)
    try:
        yield CallContext(session.request_id, trace.set_span_in_context(span, session.trace_context))
    except Exception as error:
        span.record_exception(error)
        raise
    finally:
        span.end()


def call_replica(handle: DeploymentHandle, context: CallContext, *args: Any) -> Any:
    return run_in_fresh_context(context, handle.remote, *args)


def run_in_fresh_context(context: CallContext, function: Callable[..., Any], *args: Any) -> Any:
    """Outside of the request's context.

    There Ray Serve gives every call the request's own inner id, by which it finds the caller who waits for a replica:
    of two who wait at once, one would wait for ever. It would also end calls with the request in whose context they
    were made; ours are ended by whoever made them.
    """
    fresh = contextvars.Context()
    fresh.run(context.activate)
    return fresh.run(function, *args)


async def await_result(response: Any) -> Any:
    """Of a call, which is cancelled with the caller."""
    try:
        return await _unwrap_errors(response)
    except BaseException:
        response.cancel()
        raise


async def stream_items(responses: Any) -> AsyncGenerator[TokenDelta]:
    """Of a stream, which is cancelled with its reader."""
    try:
        with suppress(StopAsyncIteration):
            while True:
                yield await _unwrap_errors(anext(responses))
    finally:
        responses.cancel()


async def _unwrap_errors(call: Awaitable[Any]) -> Any:
    """Errors of the replica as they were raised there."""
    try:
        return await call
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and not task.cancelling():  # by Ray, not by our caller
            raise TaskCancelledError from None
        raise
