"""Builds the responses and chunks of the two endpoints.

They are built from the events of their choices.
"""

import json
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from deployments.api.best_of import BestOf
from deployments.api.reports import aggregate_usage, build_report, trace_text_delta, trace_verification
from deployments.api.request_models import StreamOptions
from deployments.api.response_models import (
    ChatCompletion,
    ChatCompletionChoice,
    ChatCompletionLogprobs,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    ChatCompletionToolCall,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionUsage,
    FunctionCall,
    ParseReport,
    TopLogprob,
)
from deployments.api.token_text import TokenText
from deployments.observability.choice_state import ChoiceState
from parse.events import Event, Finished, PromptLogprobs, TextDelta, Verification
from parse.tool_calls import ToolCallDelta
from parse.types import FinishReason, Logprob

OBFUSCATION_BLOCK = 32  # bytes; with `include_obfuscation`, the lengths of chunks are multiples of it


@dataclass(frozen=True)
class ResponseContext:
    """The values that all parts of a response have in common."""

    model: str
    prompt_lengths: Sequence[int]  # tokens of each prompt
    trace: bool
    stream_options: StreamOptions
    best_of: BestOf | None
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def total_usage(self, choices: Sequence[ChoiceState]) -> CompletionUsage:
        return aggregate_usage(
            self.prompt_lengths, [choice.num_tokens for choice in choices], [choice.result.usage for choice in choices]
        )

    def build_reports(self, choices: Sequence[ChoiceState]) -> ParseReport | list[ParseReport]:
        reports = [build_report(choice, trace=self.trace) for choice in choices]
        return reports[0] if len(reports) == 1 else reports

    def trace_event(self, event: TextDelta | Verification) -> dict[str, Any] | None:
        """Returns the trace of an event for a chunk, or None without a requested trace."""
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
        usage: CompletionUsage | dict[str, int] | None = None,
    ) -> str:
        body = {"id": self.id, "object": object_name, "created": self.created, "model": self.model, "choices": choices}
        if self.stream_options.include_usage:
            body["usage"] = usage.model_dump() if isinstance(usage, CompletionUsage) else usage
        if parse is not None:
            body["parse"] = parse
        if self.stream_options.include_obfuscation:
            length = len(format_sse(body | {"obfuscation": ""}))
            filler = -length % OBFUSCATION_BLOCK + OBFUSCATION_BLOCK * secrets.randbelow(2)
            body["obfuscation"] = secrets.token_hex(filler // 2 + 1)[:filler]
        return format_sse(body)

    def choice_usage(self, choice: ChoiceState) -> dict[str, int] | None:
        """Returns the usage for a chunk of a choice, or None if only the last chunk has one."""
        if not self.stream_options.continuous_usage_stats:
            return None
        prompt_tokens, completion_tokens = choice.prompt_tokens, choice.num_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


class ResponseBuilder(Protocol):
    """Builds the responses and chunks of one endpoint."""

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
                message=self._build_message(choice),
                logprobs=self._build_logprobs(choice.deltas),
                finish_reason=_finish_reason(choice),
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

    def _build_message(self, choice: ChoiceState) -> ChatCompletionMessage:
        if choice.tool_calls is None:
            return ChatCompletionMessage(content=choice.text, reasoning_content=choice.reasoning)
        content, deltas = choice.tool_calls.finish(choice.text)
        calls = [
            ChatCompletionToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in deltas
            if call.id is not None and call.name is not None
        ]
        return ChatCompletionMessage(
            content=content or (None if calls else ""), reasoning_content=choice.reasoning, tool_calls=calls or None
        )

    def first_chunk(self, choice: ChoiceState) -> str | None:
        return self._format_chunk(choice, {"role": "assistant", "content": ""})

    def event_chunk(self, choice: ChoiceState, event: Event) -> str | None:
        match event:
            case PromptLogprobs():
                return None  # chats have no echo
            case TextDelta(text=text, reasoning=reasoning):
                logprobs = self._build_logprobs([event])
                text, calls = (text, []) if choice.tool_calls is None else choice.tool_calls.add(text)
                if not text and not reasoning and not calls and logprobs is None and not self.context.trace:
                    return None
                delta: dict[str, Any] = {"reasoning_content": reasoning} if reasoning else {}
                if text or not (reasoning or calls):
                    delta["content"] = text
                if calls:
                    delta["tool_calls"] = [_call_delta(call) for call in calls]
                return self._format_chunk(choice, delta, logprobs=logprobs, parse=self.context.trace_event(event))
            case Verification():
                event_trace = self.context.trace_event(event)
                return self._format_chunk(choice, {}, parse=event_trace) if event_trace else None
            case Finished():
                text, calls = ("", []) if choice.tool_calls is None else choice.tool_calls.finish()
                rest: dict[str, Any] = {"content": text} if text else {}
                rest |= {"tool_calls": [_call_delta(call) for call in calls]} if calls else {}
                held_back = self._format_chunk(choice, rest) if rest else ""
                report = _dump(build_report(choice, trace=False))
                return held_back + self._format_chunk(choice, {}, finish=_finish_reason(choice), parse=report)

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
        usage = self.context.choice_usage(choice)
        return self.context.format_chunk("chat.completion.chunk", [chunk_choice], parse, usage)

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


def _finish_reason(choice: ChoiceState) -> Literal["stop", "length", "tool_calls"]:
    has_calls = choice.tool_calls is not None and choice.tool_calls.num_calls > 0
    finish_reason = choice.result.finish_reason
    return "tool_calls" if has_calls and finish_reason == "stop" else finish_reason


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


MIN_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True)
class CompletionResponseBuilder:
    context: ResponseContext
    token_text: TokenText

    def build_response(self, choices: Sequence[ChoiceState]) -> Completion:
        context = self.context
        returned = choices if context.best_of is None else context.best_of.select(choices)
        return Completion(
            id=context.id,
            created=context.created,
            model=context.model,
            choices=[self._build_choice(choice) for choice in returned],
            usage=context.total_usage(choices),
            parse=context.build_reports(returned),
        )

    def first_chunk(self, choice: ChoiceState) -> str | None:
        # An echoed prompt with log-probabilities is sent when these are known.
        return self._echo_chunk(choice) if choice.echo and not choice.echo.with_logprobs else None

    def event_chunk(self, choice: ChoiceState, event: Event) -> str | None:
        match event:
            case PromptLogprobs():
                return self._echo_chunk(choice)
            case TextDelta(text=text):
                if not text and not event.logprobs and not self.context.trace:
                    return None
                text_offset = choice.num_chars - len(text) + (len(choice.echo.text) if choice.echo else 0)
                logprobs = self._build_logprobs(_entries([event]), text_offset)
                return self._format_chunk(choice, text, logprobs, parse=self.context.trace_event(event))
            case Verification():
                event_trace = self.context.trace_event(event)
                return self._format_chunk(choice, parse=event_trace) if event_trace else None
            case Finished(finish):
                return self._format_chunk(choice, finish=finish, parse=_dump(build_report(choice, trace=False)))

    def usage_chunk(self, choices: Sequence[ChoiceState]) -> str:
        return self.context.format_chunk("text_completion", [], usage=self.context.total_usage(choices))

    def _echo_chunk(self, choice: ChoiceState) -> str:
        assert choice.echo is not None
        return self._format_chunk(choice, choice.echo.text, self._build_logprobs(_prompt_entries(choice), 0))

    def _format_chunk(
        self,
        choice: ChoiceState,
        text: str = "",
        logprobs: CompletionLogprobs | None = None,
        *,
        finish: FinishReason | None = None,
        parse: dict[str, Any] | None = None,
    ) -> str:
        chunk_choice = CompletionChoice(index=choice.index, text=text, logprobs=logprobs, finish_reason=finish)
        usage = self.context.choice_usage(choice)
        return self.context.format_chunk("text_completion", [chunk_choice.model_dump()], parse, usage)

    def _build_choice(self, choice: ChoiceState) -> CompletionChoice:
        return CompletionChoice(
            index=choice.index,
            text=(choice.echo.text if choice.echo else "") + choice.text,
            logprobs=self._build_logprobs([*_prompt_entries(choice), *_entries(choice.deltas)], 0),
            finish_reason=choice.result.finish_reason,
        )

    def _build_logprobs(
        self, entries: Sequence[tuple[int, Logprob | None]], text_offset: int
    ) -> CompletionLogprobs | None:
        if not entries:
            return None
        logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, logprob in entries:
            text = self.token_text.decode(token)
            logprobs.tokens.append(text)
            logprobs.text_offset.append(text_offset)
            text_offset += len(text)
            if logprob is None:
                logprobs.token_logprobs.append(None)
                logprobs.top_logprobs.append(None)
                continue
            logprobs.token_logprobs.append(max(logprob.logprob, MIN_LOGPROB))
            top_logprobs = [*logprob.top, (token, logprob.logprob)]
            logprobs.top_logprobs.append(
                {self.token_text.decode(other): max(value, MIN_LOGPROB) for other, value in top_logprobs}
            )
        return logprobs


def _entries(deltas: Sequence[TextDelta]) -> list[tuple[int, Logprob | None]]:
    """Returns the tokens of deltas with their log-probabilities, or nothing if these were not requested."""
    return [
        (token, logprob)
        for delta in deltas
        if delta.logprobs
        for token, logprob in zip(delta.token_ids, delta.logprobs, strict=True)
    ]


def _prompt_entries(choice: ChoiceState) -> list[tuple[int, Logprob | None]]:
    """Returns the tokens of an echoed prompt with their log-probabilities, or nothing if these were not requested."""
    if choice.echo is None or not choice.echo.with_logprobs:
        return []
    return list(zip(choice.echo.token_ids, (None, *choice.prompt_logprobs), strict=True))


def format_sse(body: dict[str, Any]) -> str:
    """Returns a server-sent event.

    It is ASCII, because some clients break lines at other characters.
    """
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


DONE_EVENT = "data: [DONE]\n\n"


def generate_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _dump(model: BaseModel | None) -> dict[str, Any] | None:
    return None if model is None else model.model_dump()
