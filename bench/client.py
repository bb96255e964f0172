"""Sends one request to an OpenAI-compatible server, and records the response and its times.

The client shares the machine with the server, so it does little during the measurement. Answers are checked afterwards.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from bench.workload import SampleRequest


@dataclass(frozen=True)
class RequestParams:
    """The parameters of every request."""

    model: str
    max_tokens: int = 240
    temperature: float = 0.0
    stream: bool = True
    stop: Sequence[str] = ()
    mode: str | None = None  # None: the server's default
    method: str | None = None  # the token-level method, "none" for none of them; None: the server's default
    timeout_s: float = 600.0

    def body(self, request: SampleRequest) -> dict[str, Any]:
        fields = {
            "model": self.model,
            "messages": request.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": self.stream,
        }
        if self.stream:
            fields["stream_options"] = {"include_usage": True}
        if self.stop:
            fields["stop"] = list(self.stop)
        choices = {"mode": self.mode, "speculation": self.method}
        chosen = {name: value for name, value in choices.items() if value is not None}
        return fields | ({"parse": chosen} if chosen else {})


@dataclass(frozen=True)
class ServerReport:
    """What parse-serve reports about an answer."""

    mode: str
    method: str  # the token-level method, or "none"
    draft_tokens: int
    accepted_tokens: int
    cached_tokens: int
    arrived: float  # seconds since 1970
    stages: Sequence[tuple[str, float, float]]  # name, start and end in seconds since the arrival

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> "ServerReport":
        stages = tuple((str(s["name"]), float(s["start"]), float(s["end"])) for s in report["stages"])
        draft_tokens, accepted_tokens, cached_tokens = (int(report[name]) for name in ("drafted", "accepted", "cached"))
        method = str((report["speculation"] or {"method": "none"})["method"])
        return cls(
            str(report["mode"]), method, draft_tokens, accepted_tokens, cached_tokens, float(report["arrived"]), stages
        )


@dataclass(frozen=True)
class TimedResponse:
    """An answer, with the times of its chunks."""

    text: str
    ended: bool  # the answer is complete: it did not end at a limit
    prompt_tokens: int = 0
    completion_tokens: int = 0
    report: ServerReport | None = None
    chunk_times: Sequence[float] = ()  # the arrival of each chunk of a stream


@dataclass(frozen=True)
class RequestResult:
    """The result of a request. All times are seconds of one clock."""

    request: SampleRequest
    scheduled_at: float
    finished_at: float
    response: TimedResponse | None = None
    error: str | None = None  # the kind of error: an HTTP status, the server's own code, or an exception's class
    detail: str = ""

    @property
    def latency_s(self) -> float:
        return self.finished_at - self.scheduled_at


CONNECT_S = 10.0

SendRequest = Callable[[SampleRequest, float], Awaitable[RequestResult]]
"""Sends a request that was scheduled for a time."""


class RequestFailed(Exception):
    """The server returned an error."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail)
        self.kind = kind


class ServerUnreachable(Exception):
    """The server cannot be reached."""


def open_client(url: str, api_key: str | None) -> httpx.AsyncClient:
    """Returns a client with an unlimited number of connections, which it keeps."""
    try:
        address = httpx.URL(url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise ServerUnreachable(f"{url!r} is not a valid address: {error}") from error
    return httpx.AsyncClient(
        base_url=address,
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        # The server may close an idle connection at the moment when it is used again, so the client closes it earlier.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        timeout=httpx.Timeout(None, connect=CONNECT_S),  # `send_request` limits the time of the whole request
        trust_env=False,  # a proxy would be measured as well
    )


@dataclass(frozen=True)
class ServedModel:
    """The first model that a server lists."""

    name: str
    choices: Mapping[str, Any] | None  # modes, methods and defaults, if the server is parse-serve


async def get_first_model(client: httpx.AsyncClient) -> ServedModel:
    """Returns the served model, or raises an error that explains why there is none."""
    try:
        response = await client.get("/v1/models", timeout=CONNECT_S)
        if response.status_code != 200:
            failure = _http_failure(response)
            raise ServerUnreachable(f"{client.base_url} answers {failure.kind}: {failure}")
        card = response.json()["data"][0]
        return ServedModel(str(card["id"]), card.get("parse"))
    except httpx.HTTPError as error:
        raise ServerUnreachable(f"{client.base_url} cannot be reached: {error or type(error).__name__}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServerUnreachable(f"{client.base_url} is not a server of the OpenAI API: it lists no models") from error


async def send_request(
    client: httpx.AsyncClient, params: RequestParams, request: SampleRequest, scheduled_at: float
) -> RequestResult:
    send = _send_streaming if params.stream else _send_blocking
    try:
        async with asyncio.timeout(params.timeout_s):
            response = await send(client, params.body(request))
    except RequestFailed as failure:
        return RequestResult(request, scheduled_at, time.perf_counter(), error=failure.kind, detail=str(failure))
    except (httpx.HTTPError, TimeoutError, ValueError, LookupError, TypeError, AttributeError) as error:
        # The last four come from a response that does not have the form of the API.
        return RequestResult(request, scheduled_at, time.perf_counter(), error=type(error).__name__, detail=str(error))
    return RequestResult(request, scheduled_at, time.perf_counter(), response)


async def _send_blocking(client: httpx.AsyncClient, body: Mapping[str, Any]) -> TimedResponse:
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise _http_failure(response)
    completion = response.json()
    choice = completion["choices"][0]
    return _build_response(
        choice["message"]["content"], choice["finish_reason"], completion.get("usage"), completion.get("parse")
    )


async def _send_streaming(client: httpx.AsyncClient, body: Mapping[str, Any]) -> TimedResponse:
    texts: list[str] = []
    chunk_times: list[float] = []
    finish = usage = report = None
    complete = False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise _http_failure(response)
        async for data in iter_event_data(response.aiter_raw()):
            if data == b"[DONE]":
                complete = True
                continue
            event = json.loads(data)
            if "error" in event:
                raise _parse_failure(event["error"], "error")
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    texts.append(text)
                    chunk_times.append(time.perf_counter())
                finish = choice.get("finish_reason") or finish
            usage, report = event.get("usage") or usage, event.get("parse") or report
    if not complete:
        raise RequestFailed("incomplete", "the stream ended before its end was sent")
    return _build_response("".join(texts), finish, usage, report, chunk_times)


def _build_response(
    text: str,
    finish: str | None,
    usage: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
    chunk_times: Sequence[float] = (),
) -> TimedResponse:
    prompt_tokens, completion_tokens = (
        int((usage or {}).get(name, 0)) for name in ("prompt_tokens", "completion_tokens")
    )
    return TimedResponse(
        text,
        finish == "stop",
        prompt_tokens,
        completion_tokens,
        ServerReport.from_json(report) if report else None,
        chunk_times,
    )


async def iter_event_data(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields the data of every event. Each event has one line of data, as the API sends it."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _http_failure(response: httpx.Response) -> RequestFailed:
    """Returns the error of a response. Its kind is the HTTP status, whatever the body says."""
    try:
        error = response.json()["error"]
    except (ValueError, LookupError, TypeError):
        error = response.text[:200]
    return RequestFailed(str(response.status_code), str(_parse_failure(error, "")))


def _parse_failure(error: Any, kind: str) -> RequestFailed:
    if not isinstance(error, Mapping):
        return RequestFailed(kind, str(error))
    return RequestFailed(str(error.get("code") or error.get("type") or kind), str(error.get("message", "")))
