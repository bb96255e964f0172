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
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ParseReport,
    StageTimes,
    TokenLogprob,
    TopLogprob,
    TracedPiece,
    WireUsage,
    speculation_report,
    traced,
    usage_of,
)
from deployments.api.token_text import Vocabulary
from parse.protocol import Event, Finished, TextDelta, Verification
from parse.types import Logprob


@dataclass
class Answer:
    """One choice, as far as it has come."""

    index: int
    prompt_tokens: int
    session: Session
    arrived: float  # seconds since 1970
    streamed: bool = False
    waited_s: float = 0.0  # from its arrival until it was begun
    gaps: list[float] = field(default_factory=list)  # between two parts of a stream, for a token of the later one
    pieces: list[TextDelta] = field(default_factory=list)
    verdicts: list[Verification] = field(default_factory=list)
    done: Finished | None = None
    _spoke: float | None = None

    def take(self, event: Event) -> None:
        match event:
            case TextDelta():
                self.pieces.append(event)
                if self.streamed and event.token_ids:
                    now = time.perf_counter()
                    if self._spoke is not None:
                        self.gaps.append((now - self._spoke) / len(event.token_ids))
                    self._spoke = now
            case Verification():
                self.verdicts.append(event)
            case Finished():
                self.done = event

    @property
    def ended(self) -> Finished:
        assert self.done is not None, "asked for before its end"
        return self.done

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> int:
        return sum(len(piece.token_ids) for piece in self.pieces)

    def report(self, *, trace: bool) -> ParseReport:
        usage = self.ended.usage
        stages = [StageTimes(name="queue", start=0.0, end=self.waited_s)]
        stages += [
            StageTimes(name=stage.name, start=self.waited_s + stage.start, end=self.waited_s + stage.end)
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
            speculation=speculation_report(usage),
            retries=self.session.retries,
            arrived=self.arrived,
            first_s=self.waited_s + usage.ttft_s,
            total_s=self.waited_s + usage.total_s,
            stages=stages,
            pieces=[traced_piece(piece) for piece in self.pieces] if trace else None,
            verdicts=[traced(verdict) for verdict in self.verdicts] if trace else None,
        )


def traced_piece(piece: TextDelta) -> TracedPiece:
    return TracedPiece(text=piece.text, origin=piece.origin, tokens=len(piece.token_ids))


@dataclass(frozen=True)
class Head:
    """What all parts of a reply have in common."""

    model: str
    prompts: Sequence[int]  # tokens of each prompt
    trace: bool
    usage: bool  # does the stream tell it?
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def summed(self, answers: Sequence[Answer]) -> WireUsage:
        return usage_of(self.prompts, [a.tokens for a in answers], [a.ended.usage for a in answers])

    def reports(self, answers: Sequence[Answer]) -> ParseReport | list[ParseReport]:
        reports = [answer.report(trace=self.trace) for answer in answers]
        return reports[0] if len(reports) == 1 else reports

    def shown(self, happened: TextDelta | Verification) -> dict[str, Any] | None:
        """Of what happened on the way, where the request asks for it."""
        if not self.trace:
            return None
        if isinstance(happened, TextDelta):
            return {"piece": _plain(traced_piece(happened))}
        return {"verdict": _plain(traced(happened))}

    def chunk(
        self,
        kind: str,
        choices: list[dict[str, Any]],
        parse: dict[str, Any] | None = None,
        usage: WireUsage | None = None,
    ) -> str:
        body = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        if self.usage:
            body["usage"] = _plain(usage)
        return sse(body if parse is None else body | {"parse": parse})


class Replies(Protocol):
    """Of one endpoint."""

    def whole(self, answers: Sequence[Answer]) -> BaseModel: ...

    def opening(self, answer: Answer) -> str | None: ...

    def part(self, answer: Answer, happened: Event) -> str | None: ...

    def totals(self, answers: Sequence[Answer]) -> str: ...


@dataclass(frozen=True)
class ChatReplies:
    head: Head
    vocabulary: Vocabulary

    def whole(self, answers: Sequence[Answer]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=answer.index,
                message=AnswerMessage(content=answer.text),
                logprobs=self._logprobs(answer.pieces),
                finish_reason=answer.ended.finish_reason,
            )
            for answer in answers
        ]
        head = self.head
        return ChatCompletion(
            id=head.id,
            created=head.created,
            model=head.model,
            choices=choices,
            usage=head.summed(answers),
            parse=head.reports(answers),
        )

    def opening(self, answer: Answer) -> str | None:
        return self._chunk(answer, {"role": "assistant", "content": ""})

    def part(self, answer: Answer, happened: Event) -> str | None:
        match happened:
            case TextDelta(text=text):
                logprobs = self._logprobs([happened])
                if not text and logprobs is None and not self.head.trace:
                    return None
                return self._chunk(answer, {"content": text}, logprobs=logprobs, parse=self.head.shown(happened))
            case Verification():
                shown = self.head.shown(happened)
                return self._chunk(answer, {}, parse=shown) if shown else None
            case Finished(finish):
                return self._chunk(answer, {}, finish=finish, parse=_plain(answer.report(trace=False)))

    def totals(self, answers: Sequence[Answer]) -> str:
        return self.head.chunk("chat.completion.chunk", [], usage=self.head.summed(answers))

    def _chunk(
        self,
        answer: Answer,
        delta: dict[str, Any],
        *,
        logprobs: ChatLogprobs | None = None,
        finish: str | None = None,
        parse: dict[str, Any] | None = None,
    ) -> str:
        shown = _plain(logprobs)
        choice = {"index": answer.index, "delta": delta, "logprobs": shown, "finish_reason": finish}
        return self.head.chunk("chat.completion.chunk", [choice], parse)

    def _logprobs(self, pieces: Sequence[TextDelta]) -> ChatLogprobs | None:
        if not any(piece.logprobs for piece in pieces):
            return None
        return ChatLogprobs(
            content=[
                self._logprob(token, logprob)
                for piece in pieces
                for token, logprob in zip(piece.token_ids, piece.logprobs, strict=True)
            ]
        )

    def _logprob(self, token: int, logprob: Logprob) -> TokenLogprob:
        top = [self._top(other, value) for other, value in logprob.top]
        return TokenLogprob(**dict(self._top(token, logprob.logprob)), top_logprobs=top)

    def _top(self, token: int, value: float) -> TopLogprob:
        text = self.vocabulary.text(token)
        return TopLogprob(token=text, logprob=max(value, LOWEST), bytes=self.vocabulary.bytes(token))


LOWEST = -9999.0  # JSON has no infinity


@dataclass(frozen=True)
class CompletionReplies:
    head: Head
    vocabulary: Vocabulary

    def whole(self, answers: Sequence[Answer]) -> Completion:
        head = self.head
        return Completion(
            id=head.id,
            created=head.created,
            model=head.model,
            choices=[self._choice(answer, answer.pieces, 0, answer.ended.finish_reason) for answer in answers],
            usage=head.summed(answers),
            parse=head.reports(answers),
        )

    def opening(self, answer: Answer) -> str | None:
        return None

    def part(self, answer: Answer, happened: Event) -> str | None:
        match happened:
            case TextDelta(text=text):
                if not text and not happened.logprobs and not self.head.trace:
                    return None
                said = len(answer.text) - len(text)
                return self._chunk(self._choice(answer, [happened], said, None), self.head.shown(happened))
            case Verification():
                shown = self.head.shown(happened)
                return self._chunk(self._choice(answer, [], 0, None), shown) if shown else None
            case Finished(finish):
                return self._chunk(self._choice(answer, [], 0, finish), _plain(answer.report(trace=False)))

    def totals(self, answers: Sequence[Answer]) -> str:
        return self.head.chunk("text_completion", [], usage=self.head.summed(answers))

    def _chunk(self, choice: CompletionChoice, parse: dict[str, Any] | None) -> str:
        return self.head.chunk("text_completion", [choice.model_dump()], parse)

    def _choice(self, answer: Answer, pieces: Sequence[TextDelta], said: int, finish: Any) -> CompletionChoice:
        return CompletionChoice(
            index=answer.index,
            text="".join(piece.text for piece in pieces),
            logprobs=self._logprobs(pieces, said),
            finish_reason=finish,
        )

    def _logprobs(self, pieces: Sequence[TextDelta], said: int) -> CompletionLogprobs | None:
        if not any(piece.logprobs for piece in pieces):
            return None
        found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for piece in pieces:
            for token, logprob in zip(piece.token_ids, piece.logprobs, strict=True):
                text = self.vocabulary.text(token)
                found.tokens.append(text)
                found.token_logprobs.append(max(logprob.logprob, LOWEST))
                likeliest = [*logprob.top, (token, logprob.logprob)]
                found.top_logprobs.append({self.vocabulary.text(t): max(value, LOWEST) for t, value in likeliest})
                found.text_offset.append(said)
                said += len(text)
        return found


def sse(body: dict[str, Any]) -> str:
    """As server-sent events write it: in ASCII, for some clients end lines at characters beyond it."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


END = "data: [DONE]\n\n"


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _plain(model: BaseModel | None) -> dict[str, Any] | None:
    return None if model is None else model.model_dump()
