"""Calls to a deployment of Ray Serve LLM: what is sent, and which errors become which."""

import asyncio
import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle, serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RaySystemError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.schema import ApplicationStatusOverview

from deployments.serving import deployment_lookup
from deployments.serving.deployment_lookup import is_callable, wait_for_deployment
from deployments.serving.llm_deployment import (
    DeploymentAddress,
    LLMDeployment,
    PickledRequest,
    ends_stream,
    read_events,
    translate_error,
)
from parse.engine_config import RemoteEngineConfig
from parse.engines.remote.errors import ServerUnavailable
from parse.errors import RequestError, ServerError
from tests.deployments.serving.llm_server import (
    CompletionRequest,
    ErrorInfo,
    ErrorResponse,
    LocalHandle,
    provide_request_class,
)

BODY = {"model": "m", "prompt": [[5, 6, 7], [5, 6, 7, 8]], "max_tokens": 1, "logprob_token_ids": [1, 2]}


def deployment_of(server, stall_timeout_s=5.0, handle_class=LocalHandle):
    handle: Any = handle_class(server)
    return LLMDeployment(DeploymentAddress("llm", "LLMServer", stall_timeout_s), handle)


def streamed(deployment, body=BODY):
    async def events():
        return [event async for event in deployment.stream("/v1/completions", body)]

    return asyncio.run(events())


class Scripted:
    """A deployment whose generator yields and raises the items of a list."""

    def __init__(self, *items):
        provide_request_class()
        self.items, self.requests = items, []

    async def completions(self, request):
        self.requests.append(request)
        return self._generate()

    async def _generate(self):
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            if item is None:
                await asyncio.Event().wait()
            yield item


def chunk(**choice):
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


DONE = "data: [DONE]\n\n"


def test_a_request_arrives_as_one_of_ray_serve_llm():
    provide_request_class()
    received = pickle.loads(cloudpickle.dumps(PickledRequest(BODY)))
    assert type(received) is CompletionRequest
    assert received.model_dump(exclude={"request_id"}) == CompletionRequest(**BODY).model_dump(exclude={"request_id"})


def test_the_text_of_a_prompt_shows_which_tokens_it_shares():
    """Ray Serve LLM's prefix-aware router compares the text of `prompt`, and reads nothing from token ids."""
    texts = [PickledRequest({"prompt": prompt}).prompt for prompt in ([5, 6, 7], [[5, 6, 7, 8], [5, 6]], [56, 7])]
    assert texts[1].startswith(texts[0]) and not texts[2].startswith(texts[0][:2])
    assert PickledRequest({"prompt": "Hello"}).prompt == "Hello"


def test_chunks_in_batches_and_alone_become_events():
    server = Scripted([chunk(index=0), chunk(index=1)], chunk(index=2), [DONE])
    assert [event["choices"][0]["index"] for event in streamed(deployment_of(server))] == [0, 1, 2]
    (request,) = server.requests
    assert request.stream and request.request_id.startswith("parse-")


def test_a_session_goes_to_the_router_of_the_deployment():
    options = []

    class Recording(LocalHandle):
        def options(self, **changes):
            options.append(changes)
            return super().options(**changes)

    deployment = deployment_of(Scripted([DONE]), handle_class=Recording)
    streamed(deployment.for_session("a"))
    assert options == [{"method_name": "completions", "session_id": "a", "stream": True}]


@pytest.mark.parametrize(
    ("items", "error", "attributes"),
    [
        ([[ErrorResponse(error=ErrorInfo(message="too long", type="E", code=400))]], RequestError, {}),
        ([ErrorResponse(error=ErrorInfo(message="no model", type="E", code=404))], ServerError, {}),
        (
            [[ErrorResponse(error=ErrorInfo(message="broken", type="E", code=500))]],
            ServerUnavailable,
            {"deterministic": True},
        ),
        (
            [[ErrorResponse(error=ErrorInfo(message="busy", type="E", code=503))]],
            ServerUnavailable,
            {"deterministic": False, "interrupted": False},
        ),
        ([[chunk(index=0), 'data: {"error": {"message": "NaN"}}\n\n']], ServerUnavailable, {"deterministic": True}),
        ([["data: {\n\n"]], ServerUnavailable, {"deterministic": True}),
        ([[chunk(index=0)]], ServerUnavailable, {"interrupted": True}),
        ([], ServerUnavailable, {"interrupted": True}),
        ([{"choices": []}], ServerError, {}),
        ([[chunk(index=0)], ActorDiedError()], ServerUnavailable, {"interrupted": True}),
        ([ValueError("broken engine")], ServerUnavailable, {"deterministic": True, "interrupted": False}),
        ([[chunk(index=0)], None], ServerUnavailable, {"deterministic": False, "interrupted": False}),
    ],
)
def test_an_error_in_a_stream_becomes_that_of_a_server(items, error, attributes):
    with pytest.raises(error) as raised:
        streamed(deployment_of(Scripted(*items), stall_timeout_s=0.2))
    assert {name: getattr(raised.value, name) for name in attributes} == attributes


@pytest.mark.parametrize(
    ("error", "expected", "attributes"),
    [
        (ActorDiedError(), ServerUnavailable, {"interrupted": True, "deterministic": False}),
        (ActorUnavailableError("away", None), ServerUnavailable, {"interrupted": True, "deterministic": False}),
        (TaskCancelledError(), ServerUnavailable, {"interrupted": True, "deterministic": False}),
        (BackPressureError(9, 8, 503, 1.5), ServerUnavailable, {"retry_after_s": 1.5, "deterministic": False}),
        (RayServeException("no method 'completions'"), ServerUnavailable, {"deterministic": True}),
        (RaySystemError(ValueError("out of memory")), ServerUnavailable, {"deterministic": True}),
        (RaySystemError(ModuleNotFoundError("No module named 'vllm'")), ServerError, {}),
        (ModuleNotFoundError("No module named 'vllm'"), ServerError, {}),
        (RuntimeError("first line\nsecond line"), ServerUnavailable, {"deterministic": True}),
    ],
)
def test_an_error_of_ray_becomes_that_of_a_server(error, expected, attributes):
    translated = translate_error(error)
    assert type(translated) is expected
    assert {name: getattr(translated, name) for name in attributes} == attributes
    assert "second line" not in str(translated)


def test_a_deployment_that_is_unavailable_is_called_again():
    error = DeploymentUnavailableError.__new__(DeploymentUnavailableError)
    translated = translate_error(error)
    assert isinstance(translated, ServerUnavailable) and not translated.deterministic


def test_calls_that_a_handle_lacks_are_named():
    deployment = deployment_of(Scripted())
    for call, name in (
        (deployment.get_text("/metrics"), "/metrics"),
        (deployment.get_json("/v1/models"), "/v1/models"),
        (deployment.post("/v1/completions", BODY), "/v1/completions without a stream"),
    ):
        with pytest.raises(ServerError, match=f"the handle of a deployment has no {name}"):
            asyncio.run(call)


def test_the_end_of_a_stream_is_recognized_only_as_a_whole_event():
    assert ends_stream([chunk(index=0), DONE]) and ends_stream(DONE)
    assert not ends_stream([chunk(text="data: [DONE]")])
    assert read_events([chunk(text="data: [DONE]")])[0]["choices"][0]["text"] == "data: [DONE]"


def test_an_event_may_contain_separators_of_lines_that_json_allows():
    text = "one\u2028two\u0085three"
    event = json.dumps({"choices": [{"index": 0, "text": text}]}, ensure_ascii=False)
    assert read_events(f"data: {event}\n\n")[0]["choices"][0]["text"] == text
    assert ends_stream(f"data: {event}\n\ndata: [DONE]\n\n")


# Which deployment it is


def applications(status="RUNNING", deployment_status="HEALTHY", num_running=1, message=""):
    overview: Any = SimpleNamespace(
        status=deployment_status, replica_states={"RUNNING": num_running, "STARTING": 1}, message=message
    )
    deployments = {} if deployment_status is None else {"LLMServer:m": overview}
    return {"llm": ApplicationStatusOverview(status, message, 0.0, deployments)}


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (applications(), True),
        (applications(deployment_status="UPDATING"), True),
        (applications(num_running=0), True),  # scaled to zero
        (applications("UNHEALTHY", "UNHEALTHY"), True),  # another replica runs
        (applications("DEPLOYING", "UPDATING", 0), False),
        (applications("UNHEALTHY", "UNHEALTHY", 0), False),  # it may recover
        (applications("DEPLOYING", None), False),
        (applications("NOT_STARTED", None), False),
    ],
)
def test_it_is_known_whether_a_deployment_can_be_called(statuses, expected):
    assert is_callable("llm", "LLMServer:m", statuses) is expected


@pytest.mark.parametrize(
    ("statuses", "message"),
    [
        ({}, "this Ray cluster has no application 'llm'; it has none"),
        ({"a": None, "b": None}, "this Ray cluster has no application 'llm'; it has a, b"),
        (applications("RUNNING", None), "the application 'llm' has no deployment 'LLMServer:m'; it has none"),
        (applications("DEPLOY_FAILED", None, message="no\nvllm"), "llm could not be deployed: no vllm"),
        (applications("DEPLOY_FAILED", "DEPLOY_FAILED", 0, "no GPU"), "llm/LLMServer:m could not be deployed: no GPU"),
    ],
)
def test_a_deployment_that_does_not_exist_is_named(statuses, message):
    with pytest.raises(ValueError, match=f"engine.deployment: {message}"):
        is_callable("llm", "LLMServer:m", statuses)


def test_a_replica_waits_until_the_deployment_can_be_called(monkeypatch):
    statuses = [applications("DEPLOYING", None), applications("DEPLOYING", "UPDATING", 0), applications()]
    monkeypatch.setattr(deployment_lookup, "POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=statuses.pop(0) if statuses else {}))
    config = RemoteEngineConfig(kind="remote", deployment="llm/LLMServer:m", stall_timeout_s=7)
    assert wait_for_deployment(config) == DeploymentAddress("llm", "LLMServer:m", 7.0) and not statuses


def test_a_replica_does_not_wait_for_ever(monkeypatch):
    waiting = applications("DEPLOYING", None)
    monkeypatch.setattr(deployment_lookup, "POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=waiting))
    config = RemoteEngineConfig(kind="remote", deployment="llm/LLMServer:m", retry_timeout_s=0.01)
    with pytest.raises(ValueError, match=r"llm/LLMServer:m is still being deployed after 0\.01 s"):
        wait_for_deployment(config)
