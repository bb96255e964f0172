"""Limits what a client may send before its request is handled.

Ray Serve's proxy runs uvicorn, whose parser collects headers of any size and waits for them without a limit. All
clients share the proxy's event loop, so a single request with endless headers would block them, before any key is
checked. The proxy calls `install` when it starts, because `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names it.
"""

import asyncio
import json
import socket
from http import HTTPStatus
from typing import Any

import uvicorn.protocols.http.auto
from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 2**10  # of all headers of a request and its URL together, up to one read of the socket more
MAX_HEADERS = 128
HEADER_TIMEOUT_S = 20.0  # from the start of a connection or a request to the end of its headers


def install() -> list[Middleware]:
    """Makes the servers of this process use `LimitedProtocol`. Adds no middleware."""
    uvicorn.protocols.http.auto.AutoHTTPProtocol = LimitedProtocol
    return []


class LimitedProtocol(HttpToolsProtocol):
    """The HTTP protocol of uvicorn, with limits on the size, number and duration of headers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None:  # the system then closes connections whose client has disappeared
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._start_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._header_timer is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._header_timer is not None and self._header_bytes > MAX_HEADER_BYTES:
            self._reject(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the headers must be at most {MAX_HEADER_BYTES} bytes long"
            )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._header_timer is None:  # a further request on the same connection
            self._start_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._reject(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"there must be at most {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            super().on_headers_complete()

    def _start_headers(self) -> None:
        self._header_bytes = 0
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _on_timeout(self) -> None:
        if self._header_bytes:
            self._reject(HTTPStatus.REQUEST_TIMEOUT, f"the headers must arrive within {HEADER_TIMEOUT_S:g} seconds")
        else:
            self.transport.close()

    def _reject(self, status: HTTPStatus, message: str) -> None:
        """Sends an error in the format of the API, and closes the connection."""
        if self.transport.is_closing():
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
