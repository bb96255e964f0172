"""Limits what a client may send before its request is handled, and ignores offers of HTTP/2.

Ray Serve's proxy runs uvicorn, whose parser collects headers of any size and waits for them without a limit. All
clients share the proxy's event loop, so a single request with endless headers would block them, before any key is
checked. The proxy calls `install` when it starts, because `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names it.
"""

import asyncio
import json
import re
import socket
from http import HTTPStatus
from typing import Any

import uvicorn.protocols.http.auto
from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 2**10  # of the URL and all headers, or of the trailers, up to one read of the socket more
MAX_HEADERS = 128
# Java's HttpClient offers HTTP/2 in every request. The parser would take the body for data of the other protocol.
UPGRADE_TO_HTTP2 = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n|$)", re.IGNORECASE)
REQUEST_TIMEOUT_S = 20.0  # for the headers, and for the rest of a request that has already been answered


def install() -> list[Middleware]:
    """Makes the servers of this process use `LimitedProtocol`. Adds no middleware."""
    uvicorn.protocols.http.auto.AutoHTTPProtocol = LimitedProtocol
    return []


class LimitedProtocol(HttpToolsProtocol):
    """The HTTP protocol of uvicorn, with limits on headers and trailers and on the time that a client may take.

    The time of a body is limited by the application, and idle connections between two requests by uvicorn.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buffered_bytes = 0  # received since the parser has last passed something on
        self._awaits_headers = True
        self._request_complete = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None:  # the system then closes connections whose client has disappeared
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._buffered_bytes += len(data)
        if self._awaits_headers or self._request_complete:
            headers, end, rest = data.partition(b"\r\n\r\n")
            data = UPGRADE_TO_HTTP2.sub(b"", headers) + end + rest
        super().data_received(data)
        if self._buffered_bytes > MAX_HEADER_BYTES:
            self._reject(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the headers must be at most {MAX_HEADER_BYTES} bytes long"
            )
        if self._request_complete and self.timeout_keep_alive_task is None:
            self._awaits_headers = True  # white space after a request ends uvicorn's timer, and no request has begun
        self._update_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._awaits_headers, self._request_complete = True, False

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._reject(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"there must be at most {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        self._buffered_bytes, self._awaits_headers = 0, False
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._buffered_bytes = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._buffered_bytes, self._request_complete = 0, True
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_timer()

    @property
    def _is_answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _update_timer(self) -> None:
        """Runs the timer while the server waits for the client.

        It waits for headers, or for the rest of a request that is already answered. While a response is sent, uvicorn
        may not read, so the client cannot be blamed.
        """
        is_waiting = self._is_answered and (self._awaits_headers or not self._request_complete)
        if not is_waiting or self.transport.is_closing():
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(REQUEST_TIMEOUT_S, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._timer = None
        if self._awaits_headers and self._buffered_bytes:
            self._reject(HTTPStatus.REQUEST_TIMEOUT, f"the headers must arrive within {REQUEST_TIMEOUT_S:g} seconds")
        else:
            self.transport.close()

    def _reject(self, status: HTTPStatus, message: str) -> None:
        """Sends an error in the format of the API, unless a response has begun, and closes the connection."""
        if self.transport.is_closing():
            return
        if self._awaits_headers and self._is_answered:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
