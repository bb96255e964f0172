"""From an answer's events to what the two endpoints send, whole or in chunks."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import BaseModel

from deployments.api.backend import Session
from deployments.api.protocol import (
    ChatCompletion,
    ChatCompletionChoice,
    ChatCompletionLogprobs,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionUsage,
    ParseReport,
    StageTimes,
    TopLogprob,
    TracedTextDelta,
    aggregate_usage,
    build_speculation_report,
    trace_verification,
)
from deployments.api.token_text import TokenText
from parse.protocol import Event, Finished, TextDelta, Verification
from parse.types import Logprob


@dataclass
class ChoiceState:
    """One choice, as far as it has come."""

    index: int
    prompt_tokens: int
    session: Session
    arrival_time: float  # seconds since 1970
    stream: bool = False
    queue_s: float = 0.0  # from its arrival until it was begun
    inter_token_s: list[float] = field(
        default_factory=list
    )  # between two parts of a stream, for a token of the later one
    deltas: list[TextDelta] = field(default_factory=list)
    verifications: list[Verification] = field(default_factory=list)
    finished: Finished | None = None
    _last_delta_at: float | None = None

    def add_event(self, event: Event) -> None:
        match event:
            case TextDelta():
                self.deltas.append(event)
                if self.stream and event.token_ids:
                    now = time.perf_counter()
                    if self._last_delta_at is not None:
                        self.inter_token_s.append((now - self._last_delta_at) / len(event.token_ids))
                    self._last_delta_at = now
            case Verification():
                self.verifications.append(event)
            case Finished():
                self.finished = event

    @property
    def result(self) -> Finished:
        assert self.finished is not None, "asked for before its end"
        return self.finished

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def num_tokens(self) -> int:
        return sum(len(delta.token_ids) for delta in self.deltas)

    def build_report(self, *, trace: bool) -> ParseReport:
        usage = self.result.usage
        stages = [StageTimes(name="queue", start=0.0, end=self.queue_s)]
        stages += [
            StageTimes(name=stage.name, start=self.queue_s + stage.start, end=self.queue_s + stage.end)
            for stage in usage.stages
        ]
        return ParseReport(
            mode=usage.mode,
            drafted=usage.draft_tokens,
            accepted=usage.accepted_tokens,
            rejected=usage.rejected_tokens,
            written=usage.target_tokens,
            rounds=usage.rounds,
            boundary=usage.accepted_prefix_length,
            fallback=usage.fallback.message if usage.fallback else None,
            cached=usage.cached_tokens,
            speculation=build_speculation_report(usage),
            retries=self.session.num_retries,
            arrived=self.arrival_time,
            first_s=self.queue_s + usage.ttft_s,
            total_s=self.queue_s + usage.total_s,
            stages=stages,
            pieces=[trace_text_delta(delta) for delta in self.deltas] if trace else None,
            verdicts=[trace_verification(verification) for verification in self.verifications] if trace else None,
        )


def trace_text_delta(delta: TextDelta) -> TracedTextDelta:
    return TracedTextDelta(text=delta.text, origin=delta.origin, tokens=len(delta.token_ids))


@dataclass(frozen=True)
class ResponseContext:
    """What all parts of a reply have in common."""

    model: str
    prompt_lengths: Sequence[int]  # tokens of each prompt
    trace: bool
    include_usage: bool  # does the stream tell it?
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def total_usage(self, choices: Sequence[ChoiceState]) -> CompletionUsage:
        return aggregate_usage(
            self.prompt_lengths, [choice.num_tokens for choice in choices], [choice.result.usage for choice in choices]
        )

    def build_reports(self, choices: Sequence[ChoiceState]) -> ParseReport | list[ParseReport]:
        reports = [choice.build_report(trace=self.trace) for choice in choices]
        return reports[0] if len(reports) == 1 else reports

    def trace_event(self, event: TextDelta | Verification) -> dict[str, Any] | None:
        """Of what happened on the way, where the request asks for it."""
        if not self.trace:
            return None
        if isinstance(event, TextDelta):
            return {"piece": _dump(trace_text_delta(event))}
        return {"verdict": _dump(trace_verification(event))}

    def format_chunk(
        self,
        object_name: str,
        choices: list[dict[str, Any]],
        parse: dict[str, Any] | None = None,
        usage: CompletionUsage | None = None,
    ) -> str:
        body = {"id": self.id, "object": object_name, "created": self.created, "model": self.model, "choices": choices}
        if self.include_usage:
            body["usage"] = _dump(usage)
        return format_sse(body if parse is None else body | {"parse": parse})


class ResponseBuilder(Protocol):
    """Of one endpoint."""

    def build_response(self, choices: Sequence[ChoiceState]) -> BaseModel: ...

    def first_chunk(self, choice: ChoiceState) -> str | None: ...

    def event_chunk(self, choice: ChoiceState, event: Event) -> str | None: ...

    def usage_chunk(self, choices: Sequence[ChoiceState]) -> str: ...


@dataclass(frozen=True)
class ChatResponseBuilder:
    context: ResponseContext
    token_text: TokenText

    def build_response(self, choices: Sequence[ChoiceState]) -> ChatCompletion:
        response_choices = [
            ChatCompletionChoice(
                index=choice.index,
                message=ChatCompletionMessage(content=choice.text),
                logprobs=self._build_logprobs(choice.deltas),
                finish_reason=choice.result.finish_reason,
            )
            for choice in choices
        ]
        context = self.context
        return ChatCompletion(
            id=context.id,
            created=context.created,
            model=context.model,
            choices=response_choices,
            usage=context.total_usage(choices),
            parse=context.build_reports(choices),
        )

    def first_chunk(self, choice: ChoiceState) -> str | None:
        return self._format_chunk(choice, {"role": "assistant", "content": ""})

    def event_chunk(self, choice: ChoiceState, event: Event) -> str | None:
        match event:
            case TextDelta(text=text):
                logprobs = self._build_logprobs([event])
                if not text and logprobs is None and not self.context.trace:
                    return None
                return self._format_chunk(
                    choice, {"content": text}, logprobs=logprobs, parse=self.context.trace_event(event)
                )
            case Verification():
                event_trace = self.context.trace_event(event)
                return self._format_chunk(choice, {}, parse=event_trace) if event_trace else None
            case Finished(finish):
                return self._format_chunk(choice, {}, finish=finish, parse=_dump(choice.build_report(trace=False)))

    def usage_chunk(self, choices: Sequence[ChoiceState]) -> str:
        return self.context.format_chunk("chat.completion.chunk", [], usage=self.context.total_usage(choices))

    def _format_chunk(
        self,
        choice: ChoiceState,
        delta: dict[str, Any],
        *,
        logprobs: ChatCompletionLogprobs | None = None,
        finish: str | None = None,
        parse: dict[str, Any] | None = None,
    ) -> str:
        logprobs_json = _dump(logprobs)
        chunk_choice = {"index": choice.index, "delta": delta, "logprobs": logprobs_json, "finish_reason": finish}
        return self.context.format_chunk("chat.completion.chunk", [chunk_choice], parse)

    def _build_logprobs(self, deltas: Sequence[TextDelta]) -> ChatCompletionLogprobs | None:
        if not any(delta.logprobs for delta in deltas):
            return None
        return ChatCompletionLogprobs(
            content=[
                self._build_token_logprob(token, logprob)
                for delta in deltas
                for token, logprob in zip(delta.token_ids, delta.logprobs, strict=True)
            ]
        )

    def _build_token_logprob(self, token: int, logprob: Logprob) -> ChatCompletionTokenLogprob:
        top = [self._build_top_logprob(other, value) for other, value in logprob.top]
        return ChatCompletionTokenLogprob(**dict(self._build_top_logprob(token, logprob.logprob)), top_logprobs=top)

    def _build_top_logprob(self, token: int, value: float) -> TopLogprob:
        text = self.token_text.decode(token)
        return TopLogprob(token=text, logprob=max(value, MIN_LOGPROB), bytes=self.token_text.decode_bytes(token))


MIN_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True)
class CompletionResponseBuilder:
    context: ResponseContext
    token_text: TokenText

    def build_response(self, choices: Sequence[ChoiceState]) -> Completion:
        context = self.context
        return Completion(
            id=context.id,
            created=context.created,
            model=context.model,
            choices=[self._build_choice(choice, choice.deltas, 0, choice.result.finish_reason) for choice in choices],
            usage=context.total_usage(choices),
            parse=context.build_reports(choices),
        )

    def first_chunk(self, choice: ChoiceState) -> str | None:
        return None

    def event_chunk(self, choice: ChoiceState, event: Event) -> str | None:
        match event:
            case TextDelta(text=text):
                if not text and not event.logprobs and not self.context.trace:
                    return None
                text_offset = len(choice.text) - len(text)
                return self._format_chunk(
                    self._build_choice(choice, [event], text_offset, None), self.context.trace_event(event)
                )
            case Verification():
                event_trace = self.context.trace_event(event)
                return self._format_chunk(self._build_choice(choice, [], 0, None), event_trace) if event_trace else None
            case Finished(finish):
                return self._format_chunk(
                    self._build_choice(choice, [], 0, finish), _dump(choice.build_report(trace=False))
                )

    def usage_chunk(self, choices: Sequence[ChoiceState]) -> str:
        return self.context.format_chunk("text_completion", [], usage=self.context.total_usage(choices))

    def _format_chunk(self, choice: CompletionChoice, parse: dict[str, Any] | None) -> str:
        return self.context.format_chunk("text_completion", [choice.model_dump()], parse)

    def _build_choice(
        self, choice: ChoiceState, deltas: Sequence[TextDelta], text_offset: int, finish: Any
    ) -> CompletionChoice:
        return CompletionChoice(
            index=choice.index,
            text="".join(delta.text for delta in deltas),
            logprobs=self._build_logprobs(deltas, text_offset),
            finish_reason=finish,
        )

    def _build_logprobs(self, deltas: Sequence[TextDelta], text_offset: int) -> CompletionLogprobs | None:
        if not any(delta.logprobs for delta in deltas):
            return None
        logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for delta in deltas:
            for token, logprob in zip(delta.token_ids, delta.logprobs, strict=True):
                text = self.token_text.decode(token)
                logprobs.tokens.append(text)
                logprobs.token_logprobs.append(max(logprob.logprob, MIN_LOGPROB))
                top_logprobs = [*logprob.top, (token, logprob.logprob)]
                logprobs.top_logprobs.append(
                    {self.token_text.decode(other): max(value, MIN_LOGPROB) for other, value in top_logprobs}
                )
                logprobs.text_offset.append(text_offset)
                text_offset += len(text)
        return logprobs


def format_sse(body: dict[str, Any]) -> str:
    """As server-sent events write it: in ASCII, for some clients end lines at characters beyond it."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


DONE_EVENT = "data: [DONE]\n\n"


def generate_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _dump(model: BaseModel | None) -> dict[str, Any] | None:
    return None if model is None else model.model_dump()
