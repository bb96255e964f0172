"""What stands before every request: its size, the time it may take to arrive, and whether its sender may ask at all."""

import asyncio
import hmac
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import playground
from deployments.api.errors import ApiError
from deployments.observability.access_log import CLIENT_CLOSED_REQUEST

UNAUTHENTICATED_PATHS = playground.PATHS | {"/health", "/ready", "/docs", "/redoc", "/openapi.json"}  # to everybody


def load_api_keys(file: str | None, variable: str) -> tuple[str, ...]:
    """From a file, one a line, and from the environment, separated by commas."""
    lines = Path(file).expanduser().read_text().splitlines() if file else []
    keys = [key.strip() for key in (*lines, *os.environ.get(variable, "").split(","))]
    if file and not any(line.strip() for line in lines):
        raise ValueError(f"api_keys_file: {file} holds no key")
    return tuple(key for key in keys if key)


class RequestLimitsMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
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
                raise ApiError(401, "without keys only clients on the server's own machine are served", code="no_keys")
            return
        scheme, _, credentials = Headers(scope=scope).get("authorization", "").partition(" ")
        # Every key is compared, in the same time whether or not it fits.
        sent_key = credentials.strip().encode("latin-1")  # the bytes as they came
        matches = [hmac.compare_digest(sent_key, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "a bearer key of this server is needed", code="invalid_api_key", headers=headers)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """All of it, before anything is done about it."""
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_body_bytes:
            raise self._body_too_large_error()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(CLIENT_CLOSED_REQUEST, "the client left before its request was complete")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body_bytes:
                        raise self._body_too_large_error()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            headers = {"Connection": "close"}  # what comes of it later is not read any more
            timeout_message = "body: took too long to arrive"
            raise ApiError(408, timeout_message, param="body", code="timeout", headers=headers) from None

    def _body_too_large_error(self) -> ApiError:
        return ApiError(413, f"body: is longer than {self._max_body_bytes} bytes", param="body", code="too_long")


def _is_loopback(address: str) -> bool:
    """A proxy may have put anything in its place."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback
