"""What went wrong, in the OpenAI API's shape."""

import logging
from collections.abc import Sequence
from typing import Any, get_args

from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from deployments.api.admission import Overloaded
from deployments.api.protocol import ChatRequest, CompletionRequest, ErrorBody, Failure
from deployments.observability.access_log import account_of
from parse.prompts import TemplateError
from parse.types import EngineStopped, RequestError

logger = logging.getLogger(__name__)

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """Is answered with that status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = KINDS.get(status, "invalid_request_error")
        message = _encodable(message)
        param = None if param is None else _encodable(param)
        self.body = ErrorBody(error=Failure(message=message, type=kind, param=param, code=code))

    def response(self) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def api_error(error: BaseException) -> ApiError:
    """Whatever went wrong on the way to an answer, as a client is told."""
    match error:
        case ApiError():
            return error
        case RequestError(field=field):
            return ApiError(400, str(error), param=field, code="invalid_value")
        case TemplateError():
            return ApiError(400, f"messages: {error}", param="messages", code="invalid_value")
        case Overloaded(retry_after_s=seconds):
            return ApiError(503, str(error), code="overloaded", headers={"Retry-After": str(seconds)})
        case EngineStopped():
            headers = {"Retry-After": "1"}
            return ApiError(503, "no verifier could answer; try again", code="unavailable", headers=headers)
        case TimeoutError():
            return ApiError(504, "the request took too long", code="timeout")
        case HTTPException(status_code=400, detail=detail):  # by the framework, of what it could not decode
            return ApiError(400, f"body: {detail}", param="body", code="invalid_json")
        case HTTPException(status_code=status, detail=detail):
            return ApiError(status, str(detail), headers=dict(error.headers or {}))
        case RequestValidationError():
            return invalid(error.errors())
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request", code="internal_error")


def _encodable(text: str) -> str:
    """Names of fields come from the request and may hold anything."""
    return text.encode(errors="replace").decode()


async def respond(request: HttpRequest, error: Exception) -> JSONResponse:
    told = api_error(error)
    account_of(request.scope).failed(told.status, told.body.error.code)
    return told.response()


def invalid(errors: Sequence[Any]) -> ApiError:
    """Of several faults that of a value before that of a type, and then the deepest in the request: with
    alternatives, that of the one that was meant."""
    paths = [(_path(error), error) for error in errors]
    path, error = max(paths, key=lambda found: (not found[1]["type"].endswith("_type"), len(found[0])))
    context = error.get("ctx", {})
    if field := context.get("field"):
        path = [*path, field]
    if error["type"] == "json_invalid":
        message = f"the body is no JSON: {context.get('error', 'it cannot be read')}"
        return ApiError(400, message, param="body", code="invalid_json")
    if not path:
        unread = isinstance(error.get("input"), bytes)  # by the framework, which goes by the content type
        message = "must be JSON, sent as application/json" if unread else error["msg"]
        return ApiError(400, f"body: {message}", param="body", code="invalid_value")
    nothing_allowed = error["type"] == "too_long" and context.get("max_length") == 0
    unsupported = error["type"] == "unsupported" or nothing_allowed
    message = "is not supported" if unsupported else error["msg"]
    name = _name(path)
    return ApiError(400, f"{name}: {message}", param=name, code="unsupported_field" if unsupported else "invalid_value")


def _path(error: Any) -> list[str | int]:
    """Its place in the request, without the names of the alternatives that were tried."""
    path: list[str | int] = []
    for step in error["loc"][1:]:
        key_of_a_map = path == ["logit_bias"]
        if isinstance(step, int) or step in FIELDS or key_of_a_map:
            path.append(step)
    return path if error["type"] != "json_invalid" else []


def _name(path: Sequence[str | int]) -> str:
    name = ""
    for step in path:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name if len(name) <= 100 else f"{name[:97]}..."


def _fields(model: type[BaseModel]) -> set[str]:
    names = set(model.model_fields)
    waiting: list[Any] = [info.annotation for info in model.model_fields.values()]
    while waiting:
        found = waiting.pop()
        if isinstance(found, type) and issubclass(found, BaseModel):
            names |= _fields(found)
        else:
            waiting += get_args(found)
    return names


FIELDS = _fields(ChatRequest) | _fields(CompletionRequest)
