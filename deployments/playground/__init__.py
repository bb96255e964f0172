"""The playground, a page at `/` that shows how an answer was made.

It marks which parts were drafted, accepted and rejected.

It consists of static files that use only the public API.
"""

from hashlib import blake2b
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

INDEX_FILE = "index.html"
SCRIPTS = "api charts comparison dom drafts examples main pane problems session theme transcript".split()
ASSETS = {"icon.svg": "image/svg+xml", "playground.css": "text/css"} | {f"{n}.js": "text/javascript" for n in SCRIPTS}
# Like the API documentation, these paths need no key, because the files are public and contain no answers. A client
# without a key gets an error from the API, and the page shows it. The empty path is `/` under a route prefix.
PATHS = frozenset({"", "/", *(f"/playground/{name}" for name in ASSETS)})
# The page loads nothing from other servers and has no inline scripts or styles. Text never becomes markup, because the
# output of models is not trusted.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # browsers revalidate their copy each time, so they see a new version at once
}


def create_router() -> APIRouter:
    router = APIRouter()
    _add_file_route(router, "/", INDEX_FILE, "text/html")
    for name, media_type in ASSETS.items():
        _add_file_route(router, f"/playground/{name}", name, media_type)
    return router


def _add_file_route(router: APIRouter, path: str, name: str, media_type: str) -> None:
    content = (Path(__file__).parent / name).read_bytes()
    headers = SECURITY_HEADERS | {"ETag": f'"{blake2b(content, digest_size=12).hexdigest()}"'}

    async def send_file(request: Request) -> Response:
        if headers["ETag"] in request.headers.get("if-none-match", ""):  # a compressing proxy adds W/ to the tag
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    router.add_route(path, send_file, include_in_schema=False)
