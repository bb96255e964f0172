"""From questions to a response, whole or as a stream; and what goes on beside that."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse
from opentelemetry.context import get_current
from starlette.types import Receive, Send

from deployments.api.admission import Gate
from deployments.api.backend import Backend, Session
from deployments.api.errors import ApiError, api_error
from deployments.api.request_parsing import Asked
from deployments.api.responses import END, Answer, sse
from deployments.config import ApiSettings, AuditSettings
from deployments.observability import logs, metrics
from deployments.observability.access_log import LEFT, Account, account_of
from deployments.observability.audit import Auditor
from deployments.observability.exposition import page
from deployments.observability.tracing import spanned, tracer
from parse.pipeline import Pipeline
from parse.protocol import Event, Finished, GenerationRequest


class Serving:
    """Questions in, responses out."""

    def __init__(self, backend: Backend, settings: ApiSettings, audit: AuditSettings) -> None:
        self._backend, self._meters = backend, backend.meters
        self._timeout_s = settings.request_timeout_s
        self._gate = Gate(settings.max_answers, settings.max_waiting)
        self._auditor = Auditor(audit, self._gate, self._meters, self._alone)

    def _alone(self) -> Pipeline:
        """For what no client has asked for."""
        return self._backend.session_pipeline(Session("audit", trace=get_current(), counted=False))

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        beside = [asyncio.create_task(work) for work in (self._auditor.work(), self._keep_telling())]
        try:
            yield
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        others = await self._backend.others()
        self._measure()
        return page([self._meters.figures(), *others], accept)

    async def _keep_telling(self) -> None:
        while True:
            self._measure()
            logs.flush()
            await asyncio.sleep(metrics.TELL_EVERY_S)

    def _measure(self) -> None:
        self._meters.set(metrics.ANSWERING, self._gate.places - self._gate.free)
        self._meters.set(metrics.PLACES, self._gate.places)
        self._meters.set(metrics.WAITING, self._gate.waiting)
        self._backend.measure()

    async def reply(self, asking: Awaitable[Asked], http: HttpRequest) -> Response:
        """Given up if the client leaves before there is anything to send, and nobody else would notice."""
        replying = asyncio.ensure_future(self._reply(asking, account_of(http.scope)))
        leaving = asyncio.ensure_future(_left(http.receive))
        try:
            await asyncio.wait((replying, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not replying.done():
                raise ApiError(LEFT, "the client left")
            return replying.result()
        except Exception as error:
            raise api_error(error) from error
        finally:
            replying.cancel()
            leaving.cancel()
            await asyncio.gather(replying, leaving, return_exceptions=True)

    async def _reply(self, asking: Awaitable[Asked], account: Account) -> Response:
        asked = await asking
        account.mode, account.answers = asked.mode, asked.answers
        for answer in asked.answers:
            answer.session.request_id = account.request_id
        happenings = self._answered(asked)
        if asked.stream:
            # The first must have happened before the status is sent: what fails at once fails with its own status.
            first = await anext(happenings)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return _Stream(self._streamed(asked, account, first, happenings), happenings, headers)
        async with aclosing(happenings):
            async for answer, event in happenings:
                answer.take(event)
        self._given(asked, account)
        return Response(asked.replies.whole(asked.answers).model_dump_json(), media_type="application/json")

    async def _streamed(
        self,
        asked: Asked,
        account: Account,
        first: tuple[Answer, Event],
        rest: AsyncGenerator[tuple[Answer, Event]],
    ) -> AsyncIterator[str]:
        replies = asked.replies
        try:
            for answer in asked.answers:
                if opening := replies.opening(answer):
                    yield opening
            async for answer, event in _chained(first, rest):
                answer.take(event)
                if part := replies.part(answer, event):
                    yield part
            if asked.totals:
                yield replies.totals(asked.answers)
        except Exception as error:
            fault = api_error(error)
            account.failed(fault.status, fault.body.error.code)
            yield sse(fault.body.model_dump())
        else:
            self._given(asked, account)
        yield END

    def _given(self, asked: Asked, account: Account) -> None:
        account.outcome = "ok"
        for question, answer in zip(asked.questions, asked.answers, strict=True):
            self._auditor.offer(account.request_id, question, answer)

    async def _answered(self, asked: Asked) -> AsyncGenerator[tuple[Answer, Event]]:
        """What happens to all of the answers, as it happens. Leaving the iteration gives them up."""
        happened: asyncio.Queue[tuple[Answer, Event] | None] = asyncio.Queue()
        began = time.perf_counter()

        async def one(question: GenerationRequest, answer: Answer) -> None:
            answer.waited_s = time.perf_counter() - began
            pipeline = self._backend.session_pipeline(answer.session)
            with tracer.start_as_current_span("answer", attributes={"parse.asked": question.mode}) as span:
                answer.session.trace = get_current()
                async with aclosing(pipeline.answer(question)) as events:
                    async for event in events:
                        happened.put_nowait((answer, event))
                        if isinstance(event, Finished):
                            span.set_attributes(spanned(event.usage))

        async def all_of_them() -> None:
            try:
                async with (
                    asyncio.timeout(self._timeout_s),
                    self._gate.entered(len(asked.questions)),
                    asyncio.TaskGroup() as group,
                ):
                    for question, answer in zip(asked.questions, asked.answers, strict=True):
                        group.create_task(one(question, answer))
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            finally:
                happened.put_nowait(None)

        working = asyncio.create_task(all_of_them())
        try:
            while (item := await happened.get()) is not None:
                yield item
            await working  # raises what went wrong
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


class _Stream(StreamingResponse):
    """However it ends, the answers end with it, and not only once nobody holds it any more."""

    def __init__(
        self, content: AsyncIterator[str], happenings: AsyncGenerator[tuple[Answer, Event]], headers: dict[str, str]
    ) -> None:
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._happenings = happenings

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._happenings):
            await super().stream_response(send)


async def _chained(
    first: tuple[Answer, Event], rest: AsyncGenerator[tuple[Answer, Event]]
) -> AsyncIterator[tuple[Answer, Event]]:
    yield first
    async for item in rest:
        yield item


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
