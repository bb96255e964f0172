"""Handles parsed requests.

It generates the answers and sends them, complete or as a stream. Each answer is a task, so one request is drafted while
another one is verified (`CompletionHandler._generate`).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import Literal

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse
from opentelemetry.context import get_current
from starlette.types import Receive, Send

from deployments.api.admission import AdmissionQueue
from deployments.api.backend import Backend
from deployments.api.errors import ApiError, to_api_error
from deployments.api.request_parsing import ParsedRequest
from deployments.api.responses import DONE_EVENT, format_sse
from deployments.config import ApiSettings, AuditSettings
from deployments.observability import logs, metrics
from deployments.observability.access_log import CLIENT_CLOSED_REQUEST, RequestRecord, get_request_record
from deployments.observability.audit import Auditor
from deployments.observability.choice_state import ChoiceState
from deployments.observability.exposition import encode_metrics
from deployments.observability.tracing import span_attributes, tracer
from deployments.session import Session
from parse.events import Event, Finished
from parse.pipeline import Pipeline
from parse.requests import GenerationRequest

KEEP_ALIVE_INTERVAL_S = 15.0  # well below the limits of common proxies, which begin at 30 s
KEEP_ALIVE_COMMENT = ": keep-alive\n\n"  # clients ignore comments

ChoiceEvent = tuple[ChoiceState, Event]


class CompletionHandler:
    """Handles the requests of both endpoints.

    It also runs the audits and the export of metrics in the background.
    """

    def __init__(self, backend: Backend, settings: ApiSettings, audit: AuditSettings) -> None:
        self._backend, self._recorder = backend, backend.recorder
        self._timeout_s = settings.request_timeout_s
        self._admission_queue = AdmissionQueue(settings.max_answers, settings.max_queued_requests)
        self._auditor = Auditor(audit, self._admission_queue, self._recorder, self._create_audit_pipeline)

    def _create_audit_pipeline(self) -> Pipeline:
        """Returns a pipeline for requests that no client is waiting for."""
        return self._backend.pipeline_for_session(Session("audit", trace_context=get_current(), counts_as_busy=False))

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        background_tasks = [
            asyncio.create_task(coroutine) for coroutine in (self._auditor.run(), self._export_metrics_loop())
        ]
        try:
            yield
        finally:
            for task in background_tasks:
                task.cancel()
            await asyncio.gather(*background_tasks, return_exceptions=True)

    async def render_metrics(self, accept: str) -> tuple[bytes, str]:
        peers = await self._backend.collect_peer_metrics()
        self._update_metrics()
        return encode_metrics([self._recorder.collect(), *peers], accept)

    async def _export_metrics_loop(self) -> None:
        while True:
            self._update_metrics()
            logs.flush_serve_logger()
            await asyncio.sleep(metrics.EXPORT_INTERVAL_S)

    def _update_metrics(self) -> None:
        self._recorder.set(
            metrics.ANSWERS_RUNNING, self._admission_queue.num_slots - self._admission_queue.num_free_slots
        )
        self._recorder.set(metrics.ANSWER_SLOTS, self._admission_queue.num_slots)
        self._recorder.set(metrics.REQUESTS_WAITING, self._admission_queue.num_waiting)
        self._backend.update_metrics()

    async def handle(self, parsing: Awaitable[ParsedRequest], http: HttpRequest) -> Response:
        """Returns the response.

        If the client disconnects before there is a response, the work for it is stopped.
        """
        response_task = asyncio.ensure_future(self._respond(parsing, get_request_record(http.scope)))
        disconnect_task = asyncio.ensure_future(_wait_for_disconnect(http.receive))
        try:
            await asyncio.wait((response_task, disconnect_task), return_when=asyncio.FIRST_COMPLETED)
            if not response_task.done():
                raise ApiError(CLIENT_CLOSED_REQUEST, "the client disconnected")
            return response_task.result()
        except Exception as error:
            raise to_api_error(error) from error
        finally:
            response_task.cancel()
            disconnect_task.cancel()
            await asyncio.gather(response_task, disconnect_task, return_exceptions=True)

    async def _respond(self, parsing: Awaitable[ParsedRequest], record: RequestRecord) -> Response:
        parsed = await parsing
        record.mode, record.choices = parsed.mode, parsed.choices
        for choice in parsed.choices:
            choice.session.request_id = record.request_id
        choice_events = self._generate(parsed)
        if parsed.stream:
            # The status is sent after the first event, so that a request that fails before it gets the right status. If
            # the first event takes long, the status is sent before it, because proxies close silent connections.
            first_item = await anext(choice_events)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            headers |= self._admission_queue.rate_limit_headers()
            return _EventStreamResponse(
                self._stream_chunks(parsed, record, first_item, choice_events), choice_events, headers
            )
        async with aclosing(choice_events):
            async for item in choice_events:
                if item is not None:
                    choice, event = item
                    choice.add_event(event)
        self._mark_succeeded(parsed, record)
        return Response(
            parsed.response_builder.build_response(parsed.choices).model_dump_json(),
            media_type="application/json",
            headers=self._admission_queue.rate_limit_headers(),
        )

    async def _stream_chunks(
        self,
        parsed: ParsedRequest,
        record: RequestRecord,
        first_item: ChoiceEvent | None,
        later_items: AsyncGenerator[ChoiceEvent | None],
    ) -> AsyncIterator[str]:
        builder = parsed.response_builder
        try:
            for choice in parsed.choices:
                if chunk := builder.first_chunk(choice):
                    yield chunk
            async for item in _prepend(first_item, later_items):
                if item is None:
                    yield KEEP_ALIVE_COMMENT
                    continue
                choice, event = item
                choice.add_event(event)
                if chunk := builder.event_chunk(choice, event):
                    yield chunk
            if parsed.include_usage:
                yield builder.usage_chunk(parsed.choices)
        except Exception as error:
            api_error = to_api_error(error)
            record.mark_failed(api_error.status, api_error.body.error.code)
            yield format_sse(api_error.body.model_dump())
        else:
            self._mark_succeeded(parsed, record)
        yield DONE_EVENT

    def _mark_succeeded(self, parsed: ParsedRequest, record: RequestRecord) -> None:
        record.outcome = "ok"
        for request, choice in zip(parsed.generation_requests, parsed.choices, strict=True):
            self._auditor.submit(record.request_id, request, choice)

    async def _generate(self, parsed: ParsedRequest) -> AsyncGenerator[ChoiceEvent | None]:
        """Yields the events of all choices as they happen, and None at regular intervals.

        Leaving the iteration cancels the choices.
        """
        queue: asyncio.Queue[ChoiceEvent | Literal["interval", "end"]] = asyncio.Queue()
        started = time.perf_counter()

        async def generate_choice(request: GenerationRequest, choice: ChoiceState) -> None:
            choice.queue_s = time.perf_counter() - started
            pipeline = self._backend.pipeline_for_session(choice.session)
            with tracer.start_as_current_span("answer", attributes={"parse.requested_mode": request.mode}) as span:
                choice.session.trace_context = get_current()
                async with aclosing(pipeline.generate(request)) as events:
                    async for event in events:
                        queue.put_nowait((choice, event))
                        if isinstance(event, Finished):
                            span.set_attributes(span_attributes(event.usage))

        async def generate_all() -> None:
            try:
                async with (
                    asyncio.timeout(self._timeout_s),
                    self._admission_queue.hold_slots(len(parsed.generation_requests)),
                    asyncio.TaskGroup() as group,
                ):
                    for request, choice in zip(parsed.generation_requests, parsed.choices, strict=True):
                        group.create_task(generate_choice(request, choice))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            finally:
                queue.put_nowait("end")

        async def mark_intervals() -> None:
            while True:
                await asyncio.sleep(KEEP_ALIVE_INTERVAL_S)
                queue.put_nowait("interval")

        tasks = asyncio.create_task(generate_all()), asyncio.create_task(mark_intervals())
        try:
            while (item := await queue.get()) != "end":
                yield None if item == "interval" else item
            await tasks[0]  # raises the exception of the task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _EventStreamResponse(StreamingResponse):
    """A stream that stops generating when the response ends for any reason.

    Otherwise generation would continue until the generator is garbage-collected.
    """

    def __init__(
        self,
        content: AsyncIterator[str],
        choice_events: AsyncGenerator[ChoiceEvent | None],
        headers: dict[str, str],
    ) -> None:
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._choice_events = choice_events

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._choice_events):
            await super().stream_response(send)


async def _prepend(
    first: ChoiceEvent | None, rest: AsyncGenerator[ChoiceEvent | None]
) -> AsyncIterator[ChoiceEvent | None]:
    yield first
    async for item in rest:
        yield item


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
