"""Serves the variants of a request that clients take for granted: HEAD, and paths with a slash at the end."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


def without_trailing_slash(scope: Scope) -> str:
    """Returns the path of a request. The root of an application keeps its slash."""
    path, root_path = str(scope["path"]), str(scope.get("root_path", ""))
    return path.rstrip("/") if path.removeprefix(root_path).strip("/") else path


class LenientRoutingMiddleware:
    """ASGI middleware that serves HEAD like GET without a body, and `/v1/models/` like `/v1/models`.

    A redirect would not do, because many clients do not follow it with a POST.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = without_trailing_slash(scope)
        if scope["method"] != "HEAD":
            await self._app({**scope, "path": path}, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "path": path, "method": "GET"}, receive, send_without_body)
