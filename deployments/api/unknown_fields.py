"""What happens to the fields of a request that this API does not have.

They are rejected, unless the operator has set `ignore_unknown_fields`. Then they are left out, and a header of the
response lists them.
"""

from contextvars import ContextVar

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

IGNORED_FIELDS_HEADER = "x-ignored-fields"
MAX_LISTED_FIELDS, MAX_NAME_LENGTH = 32, 64

_ignored_fields: ContextVar[list[str] | None] = ContextVar("ignored_fields", default=None)


def ignore_field(name: str) -> bool:
    """Returns whether an unknown field of the current request is ignored. If so, it is listed."""
    ignored = _ignored_fields.get()
    if ignored is None:
        return False
    ignored.append(name)
    return True


class IgnoreUnknownFieldsMiddleware:
    """ASGI middleware that lets the requests of an app have unknown fields."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ignored: list[str] = []

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and ignored:
                names = list(dict.fromkeys(map(_printable, ignored)))
                MutableHeaders(scope=message)[IGNORED_FIELDS_HEADER] = ", ".join(names[:MAX_LISTED_FIELDS])
            await send(message)

        token = _ignored_fields.set(ignored)
        try:
            await self._app(scope, receive, send_with_header)
        finally:
            _ignored_fields.reset(token)


def _printable(name: str) -> str:
    return "".join(char if "!" <= char <= "~" and char != "," else "?" for char in name[:MAX_NAME_LENGTH])
