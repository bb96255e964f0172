"""One server: sends JSON, receives JSON or a stream of events, and tells lost calls from rejected ones.

`server_pool.py` chooses among several servers, and checks that each one still serves the same model.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from parse.engines.remote.errors import ServerUnavailable
from parse.errors import RequestError, ServerError

KEEP_ALIVE_S = 4.0  # vLLM closes a connection that has been idle for 5 s; a call on it would be lost
MAX_LINE_BYTES = 2**23  # of one event of a stream; those of SGLang repeat all log-probabilities of the answer
MAX_ERROR_CHARACTERS = 500

REJECTED_REQUEST = frozenset((400, 413, 422))
BAD_CREDENTIALS = frozenset((401, 403))
OVERLOADED = frozenset((429, 502, 503, 504))


@dataclass(frozen=True)
class ServerAddress:
    """Where a server is, and how it is called."""

    url: str
    connect_timeout_s: float
    stall_timeout_s: float
    api_key: str | None = None
    tls_ca_file: str | None = None
    socket_path: str | None = None
    """A Unix socket, for a server on this machine. The host of the URL is then only a name."""

    def open(self) -> "Server":
        return Server(self)


class Server:
    """Implements `Transport` over HTTP.

    Calls may be made at the same time, all of them in one event loop. A later one may take its place.
    """

    def __init__(self, address: ServerAddress) -> None:
        self.url = address.url.rstrip("/")
        self._address = address
        self._headers = {"Authorization": f"Bearer {address.api_key}"} if address.api_key else {}
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def for_session(self, session_key: str) -> "Server":
        return self

    async def get_json(self, path: str) -> Any:
        async with self._response("GET", path) as response:
            return await _read_json(response)

    async def get_text(self, path: str) -> str:
        async with self._response("GET", path) as response:
            return await response.text()

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        async with self._response("POST", path, body) as response:
            return await _read_json(response)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any]:
        """Yields the data of server-sent events up to [DONE]. Closing the generator ends the call on the server too."""
        async with self._response("POST", path, body) as response:
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue  # an empty line or a comment
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = _parse_json(data)
                if isinstance(event, Mapping) and "error" in event:
                    raise ServerUnavailable(error_message(event), deterministic=True)
                yield event
        raise ServerUnavailable("the stream ended early", interrupted=True)

    def close(self) -> None:
        """Closes the connections. Any thread may call this, also after the event loop has ended."""
        if self._session is None:
            return
        closing, self._session = self._session.close(), None
        if self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(closing, self._loop)
        else:
            with suppress(StopIteration):
                closing.send(None)  # there is nothing to wait for without an event loop

    async def aclose(self) -> None:
        """Closes the connections, in the event loop of the calls."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @asynccontextmanager
    async def _response(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        try:
            async with self._open_session().request(
                method, self.url + path, json=body, headers=self._headers, allow_redirects=False
            ) as response:
                await _check_status(response)
                yield response
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            interrupted = isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError)
            # The message of a timeout is empty.
            message = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ServerUnavailable(message, interrupted=interrupted) from error

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is not None and self._loop is not asyncio.get_running_loop():
            self.close()
        if self._session is None:
            self._loop = asyncio.get_running_loop()
            self._session = aiohttp.ClientSession(
                connector=self._connector(),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._address.connect_timeout_s, sock_read=self._address.stall_timeout_s
                ),
                read_bufsize=MAX_LINE_BYTES,
            )
        return self._session

    def _connector(self) -> aiohttp.BaseConnector:
        address = self._address
        if address.socket_path is not None:
            return aiohttp.UnixConnector(address.socket_path, limit=0, keepalive_timeout=KEEP_ALIVE_S)
        context = ssl.create_default_context(cafile=address.tls_ca_file) if self.url.startswith("https") else True
        return aiohttp.TCPConnector(limit=0, ssl=context, keepalive_timeout=KEEP_ALIVE_S)


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    try:
        body: Any = json.loads(await response.text())
    except ValueError:
        body = None
    raise error_of_status(response.status, error_message(body), retry_after_s=_retry_after_s(response))


def error_of_status(status: int, message: str, *, retry_after_s: float = 0.0) -> Exception:
    """Returns the error to raise for a response with an HTTP status other than 200."""
    if status in REJECTED_REQUEST:
        return RequestError("request", message)
    message = f"the server answered {status}: {message}"
    if status in BAD_CREDENTIALS or status == 404 or status < 400:
        return ServerError(message)
    return ServerUnavailable(message, retry_after_s=retry_after_s, deterministic=status not in OVERLOADED)


def error_message(body: Any) -> str:
    """Returns the message of an error in the formats of OpenAI and FastAPI."""
    for key in ("error", "message", "detail"):
        if isinstance(body, Mapping) and key in body:
            body = body[key]
    return " ".join(str(body).split())[:MAX_ERROR_CHARACTERS] if body else "no message"


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    try:
        return min(30.0, max(0.0, float(response.headers.get("Retry-After", "0"))))
    except ValueError:
        return 0.0


async def _read_json(response: aiohttp.ClientResponse) -> Any:
    return _parse_json(await response.read())


def _parse_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise ServerUnavailable(f"the server sent no JSON: {data[:80]!r}", deterministic=True) from None
