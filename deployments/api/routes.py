"""The routes: the OpenAI API, health, metrics and the playground."""

from copy import deepcopy
from importlib import metadata
from typing import Any

from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from deployments import playground
from deployments.api.admission import RATE_LIMIT_HEADERS
from deployments.api.backend import Backend
from deployments.api.errors import ApiError, handle_exception
from deployments.api.handlers import CompletionHandler
from deployments.api.limits import RequestLimitsMiddleware, load_api_keys
from deployments.api.request_models import ChatCompletionRequest, CompletionRequest
from deployments.api.request_parsing import RequestParser
from deployments.api.response_models import (
    ChatCompletion,
    Completion,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    VersionResponse,
)
from deployments.api.routing import LenientRoutingMiddleware
from deployments.api.tokenization import DetokenizeRequest, TokenizeRequest
from deployments.api.unknown_fields import IGNORED_FIELDS_HEADER, IgnoreUnknownFieldsMiddleware
from deployments.config import ApiSettings, AuditSettings
from deployments.observability.access_log import REQUEST_ID_HEADER, AccessLogMiddleware
from parse.errors import RequestError
from parse.prompts import TemplateError

NO_AUDIT = AuditSettings()
EXPOSED_HEADERS = (REQUEST_ID_HEADER, "retry-after", IGNORED_FIELDS_HEADER, *RATE_LIMIT_HEADERS)
"""What scripts of other origins may read."""
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}  # Ray Serve traces requests
DESCRIPTION = (
    "The OpenAI API with PARSE: a small model drafts an answer, a larger one verifies it and generates the rest."
)
ERROR_DESCRIPTIONS: dict[int | str, str] = {
    400: "The request is invalid. `param` names the field.",
    401: "A key is missing or wrong.",
    404: "There is no such model.",
    408: "The request took too long to arrive.",
    413: "The body is too long.",
    502: "The server that runs the model answers with an error.",
    503: "Too many requests wait, or no verifier responds. `Retry-After` says after how many seconds to try again.",
    504: "The answer took too long.",
    "default": "Any other error.",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": meaning} for status, meaning in ERROR_DESCRIPTIONS.items()
}
METRICS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")}}
}
BODY_ERRORS = 400, 401, 404, 408, 413, "default"
CHUNK_SCHEMA = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": CHUNK_SCHEMA}}}
}


def create_app(backend: Backend, settings: ApiSettings, model_name: str, audit: AuditSettings = NO_AUDIT) -> FastAPI:
    keys = load_api_keys(settings.api_keys_file, settings.api_keys_env)
    parser = RequestParser(backend.pipeline, settings, model_name)
    handler = CompletionHandler(backend, settings, audit)
    app = FastAPI(
        title="parse-serve", version="1", description=DESCRIPTION, lifespan=handler.lifespan, telemetry=NO_TELEMETRY
    )
    app.add_middleware(
        RequestLimitsMiddleware,
        keys=keys,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
    )
    if settings.ignore_unknown_fields:
        app.add_middleware(IgnoreUnknownFieldsMiddleware)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(LenientRoutingMiddleware)
    app.add_middleware(AccessLogMiddleware, recorder=backend.recorder)  # the outermost middleware
    for exception_class in (ApiError, RequestError, TemplateError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(exception_class, handle_exception)
    bearer = Depends(HTTPBearer(auto_error=False, description="A key is required if the server has keys."))

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=ERROR_RESPONSES | STREAM_RESPONSES,
        dependencies=[bearer],
    )
    async def chat_completions(request: ChatCompletionRequest, http: HttpRequest) -> Response:
        return await handler.handle(parser.parse_chat(request), http)

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=ERROR_RESPONSES | STREAM_RESPONSES,
        dependencies=[bearer],
    )
    async def completions(request: CompletionRequest, http: HttpRequest) -> Response:
        return await handler.handle(parser.parse_completion(request), http)

    @app.get("/v1/models", responses=_error_responses(401, "default"), dependencies=[bearer])
    async def models() -> ModelList:
        return ModelList(data=[parser.model_card])

    @app.get("/v1/models/{model:path}", responses=_error_responses(401, 404, "default"), dependencies=[bearer])
    async def model(model: str) -> ModelCard:
        parser.check_model(model)
        return parser.model_card

    @app.post("/tokenize", responses=_error_responses(*BODY_ERRORS), dependencies=[bearer])
    async def tokenize(request: TokenizeRequest) -> TokenizeResponse:
        return await parser.tokenize(request)

    @app.post("/detokenize", responses=_error_responses(*BODY_ERRORS), dependencies=[bearer])
    async def detokenize(request: DetokenizeRequest) -> DetokenizeResponse:
        return await parser.detokenize(request)

    @app.get("/version", responses=_error_responses(401, "default"), dependencies=[bearer])
    async def version() -> VersionResponse:
        return VersionResponse(version=metadata.version("parse-serve"))

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Says that the router is running."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "No verifier responds."}})
    async def ready() -> JSONResponse:
        """Says whether requests can be answered.

        If no drafter responds, requests are answered, but it takes longer. `deployment` says why the last deployment
        failed. An earlier version is then serving.
        """
        troubles = backend.unavailable_parts()
        status = "unavailable" if "verifier" in troubles else "degraded" if troubles else "ready"
        content = {"status": status, "troubles": troubles, "deployment": await backend.deployment_failure()}
        return JSONResponse(content, 503 if status == "unavailable" else 200)

    @app.get("/metrics", responses=METRICS_RESPONSES | _error_responses(401, "default"), dependencies=[bearer])
    async def metrics(http: HttpRequest) -> Response:
        """Returns the metrics of all routers, drafters and verifiers, for Prometheus."""
        content, content_type = await handler.render_metrics(http.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    app.include_router(playground.create_router())
    if not keys:
        _make_authentication_optional(app)
    return app


def _make_authentication_optional(app: FastAPI) -> None:
    """Lets the document of the API say that requests need no key."""
    create_document = app.openapi

    def openapi() -> dict[str, Any]:
        document = deepcopy(create_document())
        for operations in document["paths"].values():
            for operation in operations.values():
                if "security" in operation:
                    operation["security"] = [{}, *operation["security"]]
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the documented way to change the document


def _error_responses(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    return {status: ERROR_RESPONSES[status] for status in statuses}
