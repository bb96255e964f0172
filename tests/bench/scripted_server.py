"""A server of the OpenAI API whose answers are those of a function."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tests.deployments.live import served


@dataclass(frozen=True)
class ScriptedAnswer:
    text: str
    finish_reason: str = "stop"
    draft_tokens: int = 0
    accepted_tokens: int = 0


Script = Callable[[Mapping[str, Any]], ScriptedAnswer]
"""Receives the body of a request."""


@contextmanager
def scripted_server(script: Script) -> Iterator[str]:
    """Yields the address of the server."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "scripted"}]}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await request.json()
        answer = script(body)
        if not body["stream"]:
            message = {"role": "assistant", "content": answer.text}
            return JSONResponse({"choices": [{"message": message, "finish_reason": answer.finish_reason}]})
        return StreamingResponse(map(_event, _chunks(body, answer)), media_type="text/event-stream")

    with served(app) as url:
        yield url


def _chunks(body: Mapping[str, Any], answer: ScriptedAnswer) -> Iterator[Mapping[str, Any] | None]:
    yield {"choices": [{"delta": {"content": answer.text}, "finish_reason": None}]}
    yield {"choices": [{"delta": {}, "finish_reason": answer.finish_reason}]}
    report = {"mode": body.get("parse", {}).get("mode", "auto"), "speculation": None, "cached": 0, "arrived": 0.0}
    report |= {"drafted": answer.draft_tokens, "accepted": answer.accepted_tokens, "stages": []}
    yield {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}, "parse": report}
    yield None


def _event(chunk: Mapping[str, Any] | None) -> str:
    return f"data: {'[DONE]' if chunk is None else json.dumps(chunk)}\n\n"
