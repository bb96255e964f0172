"""The HTTP side: from a request to questions, from their answers to a response, whole or as a stream."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Receive, Send

from deployments import playground
from deployments.backend import Backend, Session
from deployments.config import ApiSettings
from deployments.errors import ApiError, api_error, respond
from deployments.gate import Gate
from deployments.limits import Limits, api_keys
from deployments.openai import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    ModelCard,
    ModelList,
    Request,
    text_of,
)
from deployments.replies import END, Answer, ChatReplies, CompletionReplies, Head, Replies, new_id, sse
from deployments.vocabulary import Vocabulary
from parse.prompts import prompt_ids
from parse.protocol import Event, Mode, Question
from parse.types import RequestError

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION = 16  # tokens, as the OpenAI API has it
UNREAD_PIECE = 64  # tokens between two pieces of an answer that nobody reads along
LONG_TEXT = 20_000  # characters, from which tokenizing would hold up the other requests
DESCRIPTION = (
    "The OpenAI API, answered by PARSE: one model drafts, a larger one keeps what is right and writes the rest."
)
MEANINGS: dict[int | str, str] = {
    400: "The request cannot be served as it stands; `param` names the field.",
    401: "A key is missing or wrong.",
    404: "There is no such model.",
    408: "The request took too long to arrive.",
    413: "The request is too long.",
    503: "Too many requests are waiting; `Retry-After` says when to try again.",
    504: "The answer took too long.",
    "default": "Whatever else went wrong.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning} for status, meaning in MEANINGS.items()
}
CHUNK = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"itemSchema": CHUNK}}}}


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    questions: Sequence[Question]
    answers: Sequence[Answer]
    replies: Replies
    stream: bool
    totals: bool


def create_app(backend: Backend, settings: ApiSettings, model_name: str) -> FastAPI:
    app = FastAPI(title="parse-serve", version="1", description=DESCRIPTION)
    app.add_middleware(
        Limits,
        keys=api_keys(settings.api_keys_file, settings.api_keys_env),
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
    )
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
    bearer = Depends(HTTPBearer(auto_error=False, description="Where the server has keys."))
    serving = Serving(backend, settings, model_name)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS | STREAMED, dependencies=[bearer])
    async def chat_completions(request: ChatRequest, http: HttpRequest) -> Response:
        return await serving.reply(serving.chat(request), http.receive)

    @app.post("/v1/completions", response_model=Completion, responses=ERRORS | STREAMED, dependencies=[bearer])
    async def completions(request: CompletionRequest, http: HttpRequest) -> Response:
        return await serving.reply(serving.completion(request), http.receive)

    @app.get("/v1/models", responses=_errors(401, "default"), dependencies=[bearer])
    async def models() -> ModelList:
        return ModelList(data=[serving.card])

    @app.get("/v1/models/{model:path}", responses=_errors(401, 404, "default"), dependencies=[bearer])
    async def model(model: str) -> ModelCard:
        serving.check_model(model)
        return serving.card

    @app.get("/health")
    async def health() -> dict[str, str]:
        """This router works."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "No verifier answers."}})
    async def ready() -> JSONResponse:
        """Can it answer? Without a drafter it can, only slower."""
        troubles = backend.troubles()
        status = "unavailable" if "verifier" in troubles else "degraded" if troubles else "ready"
        return JSONResponse({"status": status, "troubles": troubles}, 503 if status == "unavailable" else 200)

    app.include_router(playground.router())
    return app


class Serving:
    """Requests in, responses out."""

    def __init__(self, backend: Backend, settings: ApiSettings, model_name: str) -> None:
        self._backend, self._settings = backend, settings
        self._pipeline = backend.pipeline
        self._vocabulary = Vocabulary(self._pipeline.tokenizer)
        self._gate = Gate(settings.max_answers, settings.max_waiting)
        self.card = ModelCard(id=model_name, created=int(time.time()), max_model_len=self._pipeline.longest or 0)

    # What is asked.

    async def chat(self, request: ChatRequest) -> Asked:
        self.check_model(request.model)
        self._check_choices(request.choices)
        turns = request.turns()
        tokenizer = self._pipeline.tokenizer
        prompt = await _aside(sum(len(turn["content"]) for turn in turns), prompt_ids, tokenizer, turns)
        prediction = None
        if request.prediction is not None:
            text = text_of(request.prediction.content)
            prediction = (await _aside(len(text), _encoded, tokenizer, text))[: self._pipeline.longest]
        key = request.prompt_cache_key or request.user or _beginning(turns)
        return self._asked(
            request,
            [prompt],
            key,
            request.parse.mode or self._usual("auto"),
            request.limit,
            request.wanted_logprobs,
            field="messages",
            messages=turns,
            prediction=prediction,
        )

    async def completion(self, request: CompletionRequest) -> Asked:
        self.check_model(request.model)
        tokenizer = self._pipeline.tokenizer
        prompts = []
        for given in request.prompts():
            ids = await _aside(len(given), _encoded, tokenizer, given) if isinstance(given, str) else list(given)
            if not ids:
                raise RequestError("prompt", "must not be empty")
            if max(ids) >= len(tokenizer):
                raise RequestError("prompt", f"token ids must lie in 0..{len(tokenizer) - 1}")
            prompts.append(ids)
        self._check_choices(request.choices * len(prompts), "n" if request.choices > 1 else "prompt")
        mode = request.parse.mode or self._usual("off")
        limit = DEFAULT_COMPLETION if request.max_tokens is None else request.max_tokens
        key = request.user or _digest(str(prompts[0][:64]))
        return self._asked(request, prompts, key, mode, limit, request.logprobs, field="prompt")

    def _asked(
        self,
        request: Request,
        prompts: Sequence[Sequence[int]],
        key: str,
        mode: Mode,
        limit: int | None,
        logprobs: int | None,
        *,
        field: str,
        messages: Sequence[dict[str, str]] = (),
        prediction: Sequence[int] | None = None,
    ) -> Asked:
        settings, pipeline = self._settings, self._pipeline
        if mode not in settings.modes:
            raise RequestError("parse.mode", f"must be one of {', '.join(settings.modes)} here, got {mode}")
        thresholds = request.thresholds(
            pipeline.settings.thresholds(), lowest_full=settings.lowest_full, lowest_prefix=settings.lowest_prefix
        )
        longest = pipeline.longest
        for prompt in prompts:
            if longest is not None and len(prompt) + (limit or 1) > longest:
                given = f"{len(prompt)} tokens" + (f" and up to {limit} of an answer" if limit else "")
                message = f"{field}: {given} are more than the {longest} that this model takes"
                raise ApiError(400, message, param=field, code="context_length_exceeded")
        seed = random.getrandbits(62) if request.seed is None else request.seed
        stream = bool(request.stream)
        questions: list[Question] = []
        answers: list[Answer] = []
        arrived = time.time()
        for prompt in prompts:
            for choice in range(request.choices):
                sampling = request.sampling(seed + choice, max_tokens=limit, logprobs=logprobs)
                if any(token >= len(pipeline.tokenizer) for token in sampling.logit_bias):
                    raise RequestError("logit_bias", f"token ids must lie in 0..{len(pipeline.tokenizer) - 1}")
                piece = 1 if stream else UNREAD_PIECE
                questions.append(Question(prompt, messages, sampling, mode, thresholds, prediction, piece))
                answers.append(Answer(len(answers), len(prompt), Session(key), arrived))
        chat = field == "messages"
        head = Head(
            model=self.card.id,
            prompts=[len(prompt) for prompt in prompts],
            trace=request.parse.trace,
            usage=request.includes_usage,
            id=new_id("chatcmpl" if chat else "cmpl"),
        )
        replies: Replies = (ChatReplies if chat else CompletionReplies)(head, self._vocabulary)
        return Asked(questions, answers, replies, stream, request.includes_usage)

    def check_model(self, name: str) -> None:
        if name != self.card.id:
            message = f"model: there is no {name[:100]!r} here, but {self.card.id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _usual(self, mode: Mode) -> Mode:
        return mode if mode in self._settings.modes else self._settings.modes[0]

    def _check_choices(self, count: int, field: str = "n") -> None:
        most = min(self._settings.max_choices, self._settings.max_answers)
        if count > most:
            raise RequestError(field, f"answers to one request are limited to {most}, got {count}")

    # What is answered.

    async def reply(self, asking: Awaitable[Asked], receive: Receive) -> Response:
        """Given up if the client leaves before there is anything to send, and nobody else would notice."""
        replying = asyncio.ensure_future(self._reply(asking))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((replying, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not replying.done():
                raise ApiError(499, "the client left")
            return replying.result()
        except Exception as error:
            raise api_error(error) from error
        finally:
            replying.cancel()
            leaving.cancel()
            await asyncio.gather(replying, leaving, return_exceptions=True)

    async def _reply(self, asking: Awaitable[Asked]) -> Response:
        asked = await asking
        happenings = self._answered(asked)
        if asked.stream:
            # The first must have happened before the status is sent: what fails at once fails with its own status.
            first = await anext(happenings)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return _Stream(asked, first, happenings, headers)
        async with aclosing(happenings):
            async for answer, event in happenings:
                answer.take(event)
        return Response(asked.replies.whole(asked.answers).model_dump_json(), media_type="application/json")

    async def _answered(self, asked: Asked) -> AsyncGenerator[tuple[Answer, Event]]:
        """What happens to all of the answers, as it happens. Leaving the iteration gives them up."""
        happened: asyncio.Queue[tuple[Answer, Event] | None] = asyncio.Queue()
        began = time.perf_counter()

        async def one(question: Question, answer: Answer) -> None:
            answer.waited_s = time.perf_counter() - began
            pipeline = self._backend.session_pipeline(answer.session)
            async with aclosing(pipeline.answer(question)) as events:
                async for event in events:
                    happened.put_nowait((answer, event))

        async def all_of_them() -> None:
            try:
                async with (
                    asyncio.timeout(self._settings.request_timeout_s),
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
        self,
        asked: Asked,
        first: tuple[Answer, Event],
        rest: AsyncGenerator[tuple[Answer, Event]],
        headers: dict[str, str],
    ) -> None:
        super().__init__(_streamed(asked, first, rest), media_type="text/event-stream", headers=headers)
        self._rest = rest

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._rest):
            await super().stream_response(send)


async def _streamed(
    asked: Asked, first: tuple[Answer, Event], rest: AsyncGenerator[tuple[Answer, Event]]
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
        yield sse(api_error(error).body.model_dump())
    yield END


async def _chained(
    first: tuple[Answer, Event], rest: AsyncGenerator[tuple[Answer, Event]]
) -> AsyncIterator[tuple[Answer, Event]]:
    yield first
    async for item in rest:
        yield item


def _errors(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    return {status: ERRORS[status] for status in statuses}


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _aside(size: int, work: Any, *given: Any) -> Any:
    """In a thread of its own, if there is much of it."""
    return work(*given) if size < LONG_TEXT else await asyncio.to_thread(work, *given)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _beginning(turns: Sequence[dict[str, str]]) -> str:
    """What all turns of a conversation share: what it began with, up to the first question."""
    users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    end = users[0] + 1 if users else 1
    return _digest(str([(turn["role"], turn["content"]) for turn in turns[:end]]))


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="replace"), digest_size=12).hexdigest()
