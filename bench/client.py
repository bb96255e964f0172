"""One question to an OpenAI-compatible server, and what came back when.

The client shares the machine with the server, so it does little meanwhile: answers are scored afterwards.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from bench.questions import Task


@dataclass(frozen=True)
class Asking:
    """What goes along with every question."""

    model: str
    max_tokens: int = 240
    temperature: float = 0.0
    stream: bool = True
    mode: str | None = None
    timeout_s: float = 600.0

    def body(self, task: Task) -> dict[str, Any]:
        asked = {
            "model": self.model,
            "messages": task.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": self.stream,
        }
        if self.stream:
            asked["stream_options"] = {"include_usage": True}
        return asked | ({"parse": {"mode": self.mode}} if self.mode else {})


@dataclass(frozen=True)
class Report:
    """What our servers say of how an answer was made."""

    mode: str
    drafted: int  # tokens
    accepted: int
    cached: int
    arrived: float  # seconds since 1970
    stages: Sequence[tuple[str, float, float]]  # name, start and end in seconds since it arrived

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> "Report":
        stages = tuple((str(s["name"]), float(s["start"]), float(s["end"])) for s in said["stages"])
        drafted, accepted, cached = (int(said[name]) for name in ("drafted", "accepted", "cached"))
        return cls(str(said["mode"]), drafted, accepted, cached, float(said["arrived"]), stages)


@dataclass(frozen=True)
class Reply:
    """An answer as it came."""

    text: str
    ended: bool  # by itself
    prompt_tokens: int = 0
    tokens: int = 0
    report: Report | None = None
    came: Sequence[float] = ()  # when each chunk of a stream did


@dataclass(frozen=True)
class Outcome:
    """What became of a question. Times are those of one clock, in seconds."""

    task: Task
    due: float  # when it was to be asked
    done: float
    reply: Reply | None = None
    error: str | None = None  # its kind: an HTTP status, the server's own code, or an exception's class
    detail: str = ""

    @property
    def latency_s(self) -> float:
        return self.done - self.due


CONNECT_S = 10.0

Ask = Callable[[Task, float], Awaitable[Outcome]]
"""A task, and when it was due."""


class Failed(Exception):
    """The server says so itself."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail)
        self.kind = kind


class Unreachable(Exception):
    """There is nobody to ask."""


def connected(url: str, api_key: str | None) -> httpx.AsyncClient:
    """Keeps its connections, as many as it takes."""
    try:
        address = httpx.URL(url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise Unreachable(f"{url!r} is no address: {error}") from error
    return httpx.AsyncClient(
        base_url=address,
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        # A connection that idles longer may be closed by the server in the very moment it is used again.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        timeout=httpx.Timeout(None, connect=CONNECT_S),  # a request has one limit for all of it
        trust_env=False,  # a proxy would be measured too
    )


async def first_model(client: httpx.AsyncClient) -> str:
    """Its name; or why there is no use in asking on."""
    try:
        response = await client.get("/v1/models", timeout=CONNECT_S)
        if response.status_code != 200:
            failure = _refusal(response)
            raise Unreachable(f"{client.base_url} answers {failure.kind}: {failure}")
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        raise Unreachable(f"{client.base_url} cannot be reached: {error or type(error).__name__}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unreachable(f"{client.base_url} is no server of the OpenAI API: it lists no models") from error


async def ask(client: httpx.AsyncClient, asking: Asking, task: Task, due: float) -> Outcome:
    answered = _streamed if asking.stream else _whole
    try:
        async with asyncio.timeout(asking.timeout_s):
            reply = await answered(client, asking.body(task))
    except Failed as failure:
        return Outcome(task, due, time.perf_counter(), error=failure.kind, detail=str(failure))
    except (httpx.HTTPError, TimeoutError, ValueError, LookupError, TypeError, AttributeError) as error:
        # The last four: of a reply in another shape than the API's.
        return Outcome(task, due, time.perf_counter(), error=type(error).__name__, detail=str(error))
    return Outcome(task, due, time.perf_counter(), reply)


async def _whole(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Reply:
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise _refusal(response)
    found = response.json()
    choice = found["choices"][0]
    return _reply(choice["message"]["content"], choice["finish_reason"], found.get("usage"), found.get("parse"))


async def _streamed(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Reply:
    texts: list[str] = []
    came: list[float] = []
    finish = usage = report = None
    complete = False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise _refusal(response)
        async for data in server_sent(response.aiter_raw()):
            if data == b"[DONE]":
                complete = True
                continue
            event = json.loads(data)
            if "error" in event:
                raise _failure(event["error"], "error")
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    texts.append(text)
                    came.append(time.perf_counter())
                finish = choice.get("finish_reason") or finish
            usage, report = event.get("usage") or usage, event.get("parse") or report
    if not complete:
        raise Failed("incomplete", "the stream ended before its end was sent")
    return _reply("".join(texts), finish, usage, report, came)


def _reply(
    text: str,
    finish: str | None,
    usage: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
    came: Sequence[float] = (),
) -> Reply:
    prompt, tokens = (int((usage or {}).get(name, 0)) for name in ("prompt_tokens", "completion_tokens"))
    return Reply(text, finish == "stop", prompt, tokens, Report.read(report) if report else None, came)


async def server_sent(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of every event; it has one line, as the API sends it."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _refusal(response: httpx.Response) -> Failed:
    """Its kind is the status, whatever the body says."""
    try:
        said = response.json()["error"]
    except (ValueError, LookupError, TypeError):
        said = response.text[:200]
    return Failed(str(response.status_code), str(_failure(said, "")))


def _failure(said: Any, kind: str) -> Failed:
    if not isinstance(said, Mapping):
        return Failed(kind, str(said))
    return Failed(str(said.get("code") or said.get("type") or kind), str(said.get("message", "")))
