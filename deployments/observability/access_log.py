"""The access log: one log line and one count for each request.

Requests are counted by their outcome.
"""

import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.observability import metrics
from deployments.observability.choice_state import ChoiceState
from deployments.observability.metrics import CancelCause, MetricsRecorder, RequestOutcome
from deployments.observability.request_metrics import record_choice_metrics
from parse.types import sum_stats

logger = logging.getLogger(__name__)

GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
REQUEST_ID_HEADER = "x-request-id"
MAX_LOGGED_LENGTH = 128
UNSAFE_CHARACTERS = re.compile("[^!-~]")  # in an id, these could end the log line or begin another field of it
SCOPE_KEY = "parse.request_record"
CLIENT_CLOSED_REQUEST = 499  # the status if the client disconnected before one was sent
STATUS_OUTCOMES: Mapping[int, RequestOutcome] = {
    401: "unauthorized",
    CLIENT_CLOSED_REQUEST: "left",
    503: "unavailable",
    504: "timeout",
}
CANCEL_CAUSES: Mapping[RequestOutcome, CancelCause] = {"left": "left_waiting", "timeout": "timeout"}
WARNING_OUTCOMES: frozenset[RequestOutcome] = frozenset({"unavailable", "failed"})


@dataclass
class RequestRecord:
    """The data collected about a request while it is served."""

    request_id: str
    path: str
    mode: str = "unknown"
    """The requested mode."""
    choices: Sequence[ChoiceState] = ()
    status: int | None = None
    outcome: RequestOutcome | None = None
    started_at: float = field(default_factory=time.perf_counter)

    def mark_failed(self, status: int, code: str | None = None) -> None:
        default: RequestOutcome = "invalid" if status < 500 else "failed"
        self.outcome = "overloaded" if code == "overloaded" else STATUS_OUTCOMES.get(status, default)

    def final_outcome(self) -> RequestOutcome:
        """Returns the outcome of a finished request.

        If there is neither a complete answer nor an error, the client has disconnected.
        """
        if self.outcome is None and self.status is not None and self.status >= 400:
            self.mark_failed(self.status)
        return self.outcome or "left"


def get_request_record(scope: Scope) -> RequestRecord:
    record: RequestRecord = scope[SCOPE_KEY]
    return record


class AccessLogMiddleware:
    """ASGI middleware that gives each request a record, an id and a line in the log."""

    def __init__(self, app: ASGIApp, *, recorder: MetricsRecorder) -> None:
        self._app, self._recorder = app, recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") or "/"
        # Ray Serve's proxy sets the header if the client does not, and also returns it to the client.
        client_request_id = Headers(scope=scope).get(REQUEST_ID_HEADER)
        record = scope[SCOPE_KEY] = RequestRecord(
            _sanitize(client_request_id) if client_request_id else uuid.uuid4().hex, _sanitize(path)
        )

        async def send_with_request_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                if not client_request_id:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_request_id)
        except Exception:
            record.mark_failed(500)
            raise
        finally:
            is_generation = scope["method"] != "OPTIONS" and path in GENERATION_PATHS
            if is_generation:
                self._record_metrics(record)
            if is_generation or 400 <= (record.status or 0) < 500:
                self._log(record)

    def _record_metrics(self, record: RequestRecord) -> None:
        outcome, recorder = record.final_outcome(), self._recorder
        recorder.add(metrics.REQUESTS, mode=record.mode, outcome=outcome)
        if outcome in CANCEL_CAUSES:
            left_while_reading = outcome == "left" and record.status == 200
            recorder.add(metrics.CANCELLATIONS, cause="left_reading" if left_while_reading else CANCEL_CAUSES[outcome])
        for choice in record.choices:
            for cause in choice.session.retry_causes:
                recorder.add(metrics.RETRIES, cause=cause)
            if outcome == "ok":
                record_choice_metrics(recorder, choice)

    def _log(self, record: RequestRecord) -> None:
        outcome = record.final_outcome()
        level = logging.WARNING if outcome in WARNING_OUTCOMES else logging.INFO
        if logger.isEnabledFor(level):
            fields = _log_fields(record, outcome)
            logger.log(level, " ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)


def _sanitize(text: str) -> str:
    return UNSAFE_CHARACTERS.sub("?", text[:MAX_LOGGED_LENGTH])


def _log_fields(record: RequestRecord, outcome: RequestOutcome) -> dict[str, Any]:
    """Returns the fields of a log line. They contain no text of prompts or answers."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "path": record.path,
        "outcome": outcome,
        "status": record.status,
        "mode": record.mode,
        "seconds": round(time.perf_counter() - record.started_at, 4),
    }
    if outcome != "ok":
        return fields
    usages = [choice.result.usage for choice in record.choices]
    fields |= {
        "prompt_tokens": sum(choice.prompt_tokens for choice in record.choices),
        "drafted": sum(usage.draft_tokens for usage in usages),
        "accepted": sum(usage.accepted_tokens for usage in usages),
        "written": sum(usage.target_tokens for usage in usages),
        "retries": sum(choice.session.num_retries for choice in record.choices),
    }
    if speculation := sum_stats(usage.speculation for usage in usages):
        target_pass_tokens = sum(usage.decoded_tokens for usage in usages if usage.speculation)
        fields |= {
            "speculation": speculation.method,
            "tokens_per_pass": round(target_pass_tokens / speculation.passes, 2),
        }
    fallbacks = [usage.fallback.cause for usage in usages if usage.fallback]
    return fields | ({"fallback": ",".join(fallbacks)} if fallbacks else {})
