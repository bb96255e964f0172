"""Checks every request before it is handled.

The checks concern the API key, the size of the body, and the time that the body takes to arrive.
"""

import asyncio
import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import playground
from deployments.api.errors import ApiError
from deployments.observability.access_log import CLIENT_CLOSED_REQUEST, REQUEST_ID_HEADER

MAX_REQUEST_ID_LENGTH = 512  # the limit in the OpenAI API
UNAUTHENTICATED_PATHS = playground.PATHS | {"/health", "/ready", "/docs", "/redoc", "/openapi.json"}


def load_api_keys(file: str | None, variable: str) -> tuple[str, ...]:
    """Returns the keys in a file and in an environment variable.

    The file has one key per line. In the variable, commas separate the keys.
    """
    lines = Path(file).expanduser().read_text().splitlines() if file else []
    keys = [key.strip() for key in (*lines, *os.environ.get(variable, "").split(","))]
    if file and not any(line.strip() for line in lines):
        raise ValueError(f"api_keys_file: {file} contains no key; write one key per line")
    return tuple(key for key in keys if key)


class RequestLimitsMiddleware:
    """ASGI middleware that authenticates requests and limits their bodies."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            _check_request_id(scope)
            if scope["path"].removeprefix(scope.get("root_path", "")) not in UNAUTHENTICATED_PATHS:
                self._authenticate(scope)
            body = await self._read_body(scope, receive)
        except ApiError as error:
            await error.to_response()(scope, receive, send)
            return

        async def receive_buffered() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message

        await self._app(scope, receive_buffered, send)

    def _authenticate(self, scope: Scope) -> None:
        if not self._keys:
            client = scope.get("client")
            if client and not _is_loopback(client[0]):
                message = (
                    "this server has no keys, so it serves only clients on its own machine: call it as 127.0.0.1, "
                    "or set PARSE_API_KEYS or api.api_keys_file on the server"
                )
                raise ApiError(401, message, code="no_keys")
            # A web page can make a browser on this machine send requests here under a name of its own (DNS rebinding).
            host = _host_name(Headers(scope=scope).get("host", ""))
            if host and not _is_this_machine(host):
                message = f"this server has no keys, so the header Host must name this machine, got {host[:100]!r}"
                raise ApiError(401, message, code="no_keys")
            return
        scheme, _, credentials = Headers(scope=scope).get("authorization", "").partition(" ")
        # Every key is compared, in constant time, so that timing reveals nothing.
        sent_key = credentials.strip().encode("latin-1")  # the bytes that were sent
        matches = [hmac.compare_digest(sent_key, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            headers = {"WWW-Authenticate": "Bearer"}
            message = "a valid key is required: send the header Authorization: Bearer <key>"
            raise ApiError(401, message, code="invalid_api_key", headers=headers)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Returns the complete body.

        A request is handled only once its body has arrived.
        """
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise self._body_too_large_error()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(CLIENT_CLOSED_REQUEST, "the client disconnected before its request was complete")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body_bytes:
                        raise self._body_too_large_error()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            headers = {"Connection": "close"}  # the rest of the body is not read
            timeout_message = f"body: must arrive within {self._body_timeout_s:g} seconds"
            raise ApiError(408, timeout_message, param="body", code="timeout", headers=headers) from None

    def _body_too_large_error(self) -> ApiError:
        message = f"body: must be at most {self._max_body_bytes} bytes long"
        return ApiError(413, message, param="body", code="too_long")


def _check_request_id(scope: Scope) -> None:
    request_id = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    if len(request_id) > MAX_REQUEST_ID_LENGTH:
        message = f"{REQUEST_ID_HEADER}: must be at most {MAX_REQUEST_ID_LENGTH} characters long"
        raise ApiError(400, message, param=REQUEST_ID_HEADER, code="invalid_value")


def _host_name(host: str) -> str:
    """Returns the name or address in a Host header, without the port and the brackets of IPv6.

    Returns a malformed header as it is.
    """
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::\d*)?", host)
    return (match[1] or match[2]).lower().removesuffix(".") if match else host


def _is_this_machine(host: str) -> bool:
    names = "localhost", socket.gethostname().lower()
    return host in names or host.endswith(".localhost") or _is_loopback(host)


def _is_loopback(address: str) -> bool:
    """Returns whether an address belongs to this machine.

    Returns False for text that is not an address, which a proxy may have set.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback
