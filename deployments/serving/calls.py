"""Calls over Ray Serve's handles.

A call is cancelled with its caller, and raises the replica's exception.
"""

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

SERVE_REQUEST_CONTEXT: contextvars.ContextVar[Any] = serve.context._serve_request_context


@dataclass(frozen=True)
class CallContext:
    """The request and the trace that a call belongs to."""

    request_id: str = ""  # appears in the log of the replica
    trace_context: Context | None = None

    def activate(self) -> None:
        SERVE_REQUEST_CONTEXT.set(_RequestContext(request_id=self.request_id))
        if self.trace_context is not None:
            attach(self.trace_context)


NO_REQUEST = CallContext()


@contextmanager
def trace_stage(name: StageName, session: Session) -> Iterator[CallContext]:
    """Opens a span in the trace of an answer.

    The span is passed on explicitly, because stages run in different tasks.
    """
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
    """Runs a function outside of the context of the current request.

    In that context, Ray Serve gives every call the internal id of the request. It uses this id to find the caller that
    waits for a replica. If two calls of a request wait at the same time, one of them is never woken. Serve would also
    cancel the calls together with the request, but in this project the callers cancel their calls.
    """
    fresh = contextvars.Context()
    fresh.run(context.activate)
    return fresh.run(function, *args)


async def await_result(response: Any) -> Any:
    """Returns the result of a call, and cancels the call if the caller is cancelled."""
    try:
        return await _unwrap_errors(response)
    except BaseException:
        response.cancel()
        raise


async def stream_items(responses: Any) -> AsyncGenerator[Any]:
    """Yields the items of a stream, and cancels it when the reader stops."""
    try:
        with suppress(StopAsyncIteration):
            while True:
                yield await _unwrap_errors(anext(responses))
    finally:
        responses.cancel()


async def _unwrap_errors(call: Awaitable[Any]) -> Any:
    """Raises the exceptions of a replica as they were raised there."""
    try:
        return await call
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and not task.cancelling():  # cancelled by Ray, not by the caller
            raise TaskCancelledError from None
        raise
