"""Errors in the format of the OpenAI API."""

import logging
from collections.abc import Sequence
from typing import Any, get_args

from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from deployments.api.admission import Overloaded
from deployments.api.request_models import ChatCompletionRequest, CompletionRequest
from deployments.api.response_models import ErrorInfo, ErrorResponse
from deployments.api.tokenization import DetokenizeRequest, TokenizeChatRequest, TokenizePromptRequest
from deployments.observability.access_log import get_request_record
from parse.errors import EngineStopped, RequestError, ServerError
from parse.prompts import TemplateError

logger = logging.getLogger(__name__)

ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """An error with the status and the body of its response."""

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
        error_type = ERROR_TYPES.get(status, "invalid_request_error")
        message = _replace_lone_surrogates(message)
        param = None if param is None else _replace_lone_surrogates(param)
        self.body = ErrorResponse(error=ErrorInfo(message=message, type=error_type, param=param, code=code))

    def to_response(self) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def to_api_error(error: BaseException) -> ApiError:
    """Returns the error that a client receives for an exception."""
    match error:
        case ApiError():
            return error
        case RequestError(field=field):
            return ApiError(400, str(error), param=field, code="invalid_value")
        case TemplateError():
            return ApiError(400, f"messages: {error}", param="messages", code="invalid_value")
        case Overloaded(headers=headers):
            return ApiError(503, str(error), code="overloaded", headers=headers)
        case EngineStopped():
            headers = {"Retry-After": "1"}
            return ApiError(503, "no verifier is available; try again", code="unavailable", headers=headers)
        case ServerError():
            return ApiError(502, str(error), code="bad_gateway")
        case TimeoutError():
            return ApiError(504, "the request took too long; request fewer tokens or try again", code="timeout")
        case HTTPException(status_code=400, detail=detail):  # raised by FastAPI for a body that it cannot decode
            return ApiError(400, f"body: {detail}", param="body", code="invalid_json")
        case HTTPException(status_code=status, detail=detail):
            return ApiError(status, str(detail), headers=dict(error.headers or {}))
        case RequestValidationError():
            return to_validation_error(error.errors())
    logger.error("a request failed with an internal error", exc_info=error)
    return ApiError(500, "an internal error occurred; the log of the server has the details", code="internal_error")


def _replace_lone_surrogates(text: str) -> str:
    """Makes text encodable.

    The names of fields come from the request and may contain anything.
    """
    return text.encode(errors="replace").decode()


async def handle_exception(request: HttpRequest, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException) and error.status_code == 404:
        url = f"{request.method} {_replace_lone_surrogates(request.url.path[:100])}"
        message = f"Invalid URL ({url}): this path does not exist; /docs lists those that do"
        error = ApiError(404, message, code="unknown_url")
    api_error = to_api_error(error)
    get_request_record(request.scope).mark_failed(api_error.status, api_error.body.error.code)
    return api_error.to_response()


def to_validation_error(errors: Sequence[Any]) -> ApiError:
    """Returns the most helpful one of several validation errors.

    Errors of values are preferred to errors of types, and deeper errors to others. If a field has alternative types,
    this is the error of the alternative that the client meant.
    """
    paths = [(_error_path(error), error) for error in errors]
    path, error = max(paths, key=lambda candidate: (not candidate[1]["type"].endswith("_type"), len(candidate[0])))
    context = error.get("ctx", {})
    if field := context.get("field"):
        path = [*path, field]
    if error["type"] == "json_invalid":
        message = f"the body is not JSON: {context.get('error', 'it cannot be read')}"
        return ApiError(400, message, param="body", code="invalid_json")
    if not path:
        wrong_content_type = isinstance(error.get("input"), bytes)  # FastAPI parses only JSON content types
        message = "must be JSON, sent as application/json" if wrong_content_type else error["msg"]
        return ApiError(400, f"body: {message}", param="body", code="invalid_value")
    must_be_empty = error["type"] == "too_long" and context.get("max_length") == 0
    unsupported = error["type"] in ("unsupported", "none_required") or must_be_empty
    message = "is not supported" if unsupported else error["msg"]
    name = _format_path(path)
    return ApiError(400, f"{name}: {message}", param=name, code="unsupported_field" if unsupported else "invalid_value")


def _error_path(error: Any) -> list[str | int]:
    """Returns the path of an error in the request.

    Pydantic also adds its own names of alternative types, which are left out.
    """
    path: list[str | int] = []
    for key in error["loc"][1:]:
        is_map_key = path == ["logit_bias"]
        if isinstance(key, int) or key in REQUEST_FIELD_NAMES or is_map_key:
            path.append(key)
    return path if error["type"] != "json_invalid" else []


def _format_path(path: Sequence[str | int]) -> str:
    name = ""
    for key in path:
        name += f"[{key}]" if isinstance(key, int) else f".{key}" if name else key
    return name if len(name) <= 100 else f"{name[:97]}..."


def _field_names(model: type[BaseModel]) -> set[str]:
    names = set(model.model_fields)
    pending: list[Any] = [info.annotation for info in model.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            names |= _field_names(annotation)
        else:
            pending += get_args(annotation)
    return names


REQUEST_MODELS: tuple[type[BaseModel], ...] = (
    *(ChatCompletionRequest, CompletionRequest),
    *(TokenizePromptRequest, TokenizeChatRequest, DetokenizeRequest),
)
REQUEST_FIELD_NAMES = frozenset[str]().union(*map(_field_names, REQUEST_MODELS))
