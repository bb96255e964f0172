"""Every request comes to an account: what became of it is counted, and told in a line of the log."""

import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.responses import Answer
from deployments.observability import metrics
from deployments.observability.metrics import CancelCause, Meters, Outcome
from deployments.observability.request_metrics import tally
from parse.protocol import Mode
from parse.types import sum_stats

logger = logging.getLogger(__name__)

ANSWERING = frozenset({"/v1/chat/completions", "/v1/completions"})
ID_HEADER = "x-request-id"
LONGEST_ID = 128
NOT_OF_A_WORD = re.compile("[^!-~]")  # in an id it would end the line of the log, or begin another figure in it
KEY = "parse.account"
LEFT = 499  # the status of who left before there was one
OUTCOMES: Mapping[int, Outcome] = {401: "unauthorized", LEFT: "left", 503: "unavailable", 504: "timeout"}
CANCELLED: Mapping[Outcome, CancelCause] = {"left": "left_waiting", "timeout": "timeout"}
SERIOUS: frozenset[Outcome] = frozenset({"unavailable", "failed"})


@dataclass
class Account:
    """What becomes known of a request while it is served."""

    request_id: str
    path: str
    mode: Mode | Literal["unknown"] = "unknown"
    answers: Sequence[Answer] = ()
    status: int | None = None
    outcome: Outcome | None = None
    started: float = field(default_factory=time.perf_counter)

    def failed(self, status: int, code: str | None = None) -> None:
        usual: Outcome = "invalid" if status < 500 else "failed"
        self.outcome = "overloaded" if code == "overloaded" else OUTCOMES.get(status, usual)

    def close(self) -> Outcome:
        """Who neither got all of an answer nor an error has left."""
        if self.outcome is None and self.status is not None and self.status >= 400:
            self.failed(self.status)
        return self.outcome or "left"


def account_of(scope: Scope) -> Account:
    found: Account = scope[KEY]
    return found


class Journal:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, meters: Meters) -> None:
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        given = Headers(scope=scope).get(ID_HEADER)  # by Ray Serve's proxy, which then tells it to the client as well
        account = scope[KEY] = Account(_plain(given) if given else uuid.uuid4().hex, _plain(path))

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.status = message["status"]
                if not given:
                    MutableHeaders(scope=message)[ID_HEADER] = account.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception:
            account.failed(500)
            raise
        finally:
            if path in ANSWERING:
                self._count(account)
            if path in ANSWERING or 400 <= (account.status or 0) < 500:
                self._log(account)

    def _count(self, account: Account) -> None:
        outcome, meters = account.close(), self._meters
        meters.add(metrics.REQUESTS, mode=account.mode, outcome=outcome)
        if outcome in CANCELLED:
            reading = outcome == "left" and account.status == 200
            meters.add(metrics.CANCELLATIONS, cause="left_reading" if reading else CANCELLED[outcome])
        for answer in account.answers:
            for cause in answer.session.lost:
                meters.add(metrics.RETRIES, cause=cause)
            if outcome == "ok":
                tally(meters, answer)

    def _log(self, account: Account) -> None:
        outcome = account.close()
        level = logging.WARNING if outcome in SERIOUS else logging.INFO
        if logger.isEnabledFor(level):
            told = _told(account, outcome)
            logger.log(level, " ".join(f"{name}={value}" for name, value in told.items()), extra=told)


def _plain(given: str) -> str:
    return NOT_OF_A_WORD.sub("?", given[:LONGEST_ID])


def _told(account: Account, outcome: Outcome) -> dict[str, Any]:
    """No word of what was asked or answered."""
    told: dict[str, Any] = {
        "request_id": account.request_id,
        "path": account.path,
        "outcome": outcome,
        "status": account.status,
        "mode": account.mode,
        "seconds": round(time.perf_counter() - account.started, 4),
    }
    if outcome != "ok":
        return told
    usages = [answer.ended.usage for answer in account.answers]
    told |= {
        "prompt_tokens": sum(answer.prompt_tokens for answer in account.answers),
        "drafted": sum(usage.draft_tokens for usage in usages),
        "accepted": sum(usage.accepted_tokens for usage in usages),
        "written": sum(usage.target_tokens for usage in usages),
        "retries": sum(answer.session.retries for answer in account.answers),
    }
    if speculated := sum_stats(usage.speculation for usage in usages):
        passed = sum(usage.decoded_tokens for usage in usages if usage.speculation)
        told |= {"speculation": speculated.method, "tokens_per_pass": round(passed / speculated.passes, 2)}
    fallbacks = [usage.fallback.cause for usage in usages if usage.fallback]
    return told | ({"fallback": ",".join(fallbacks)} if fallbacks else {})
