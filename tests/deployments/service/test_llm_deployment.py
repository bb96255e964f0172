"""A service whose target runs in a deployment of another application, as with Ray Serve LLM."""

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from aiohttp import web
from ray import serve
from ray.serve.config import RequestRouterConfig

from deployments.app import SESSION_AFFINITY_ROUTER
from parse import EngineSettings, Pair
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.engine_config import RemoteEngineConfig
from parse.prompts import chat_prompt_token_ids
from tests.deployments.service.service_client import chat, problems, replicas
from tests.deployments.service.test_layouts import pids
from tests.deployments.service.test_service import messages_of
from tests.deployments.serving.llm_server import LLMServer
from tests.parse.engines.remote.fake_vllm import FakeVLLM

ROOT = Path(__file__).parents[3]
MODES = ("off", "full", "rounds", "exact")
TARGET = {
    "model": DEMO_TARGET,
    "max_model_len": 1024,
    "engine": {"kind": "remote", "deployment": "llm/LLMServer:demo"},
}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeVLLM]:
    server = FakeVLLM(DEMO_TARGET, max_model_len=1024)
    yield server
    server.close()


@pytest.fixture(scope="module")
def service(deployed, server):
    # Serve keeps the port with which it starts.
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": deployed.port})
    decorate = serve.deployment(
        name="LLMServer:demo",
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}},
        request_router_config=RequestRouterConfig(request_router_class=SESSION_AFFINITY_ROUTER),  # type: ignore[arg-type]
        health_check_period_s=1,
    )
    serve.run(decorate(LLMServer).bind(server.url, readable_errors=False), name="llm", route_prefix=None)
    yield deployed.service(target=TARGET)
    deployed.clear()
    serve.delete("llm")


@pytest.fixture(autouse=True)
def well_behaved(server):
    yield
    server.misbehave = lambda body: None
    server.bodies.clear()


def texts(responses):
    return [response.json()["choices"][0]["message"]["content"] for response in responses]


async def ask_all(service, bodies):
    return await asyncio.gather(*(service.ask(body) for body in bodies))


def test_all_modes_answer_like_the_engine_that_calls_the_server_itself(service, server):
    requests = [(each.question, mode) for mode in MODES for each in problems(2)]
    responses = asyncio.run(ask_all(service, [chat(text, mode=mode) for text, mode in requests]))
    assert {response.status_code for response in responses} == {200}
    engine = RemoteEngineConfig(kind="remote", url=server.url)
    with Pair(EngineSettings(model=DEMO_TARGET, max_model_len=1024, engine=engine), DEMO_DRAFT) as pair:
        expected = [pair.generate(text, mode=mode, temperature=0).text for text, mode in requests]
    assert texts(responses) == expected
    assert sum(response.json()["parse"]["accepted"] for response in responses) > 0
    (card,) = httpx.get(f"{service.url}/v1/models").json()["data"]
    assert set(card["parse"]["modes"]) >= {*MODES, "progressive", "auto"} and card["parse"]["methods"] == ["none"]


def test_the_calls_of_an_answer_go_to_one_replica(service, server):
    drawn = problems(4, seed=8)
    prompts = [tuple(chat_prompt_token_ids(server.tokenizer, messages_of(problem))) for problem in drawn]
    for problem in drawn:  # one after the other, because a busy server gets no call to prefill a short prompt
        asyncio.run(ask_all(service, [chat(problem.question, mode="full")]))
    pids_of_calls = defaultdict(list)
    for body in server.bodies:
        first = body["prompt"][0] if isinstance(body["prompt"][0], list) else body["prompt"]
        for prompt in prompts:
            if tuple(first[: len(prompt)]) == prompt:
                pids_of_calls[prompt].append(body["replica"])
    assert len(pids_of_calls) == 4
    assert all(len(calls) > 1 and len(set(calls)) == 1 for calls in pids_of_calls.values())


def test_a_replica_that_is_killed_loses_no_request(service):
    bodies = [chat(problem.question, mode=mode) for problem in problems(2, seed=5) for mode in MODES]
    expected = texts(asyncio.run(ask_all(service, bodies)))

    async def under_load():
        calls = asyncio.create_task(ask_all(service, bodies))
        await asyncio.sleep(0.4)
        assert not calls.done()
        victim, _ = await replicas("LLMServer:demo", "llm").broadcast("pid").results_async()
        os.kill(victim, signal.SIGKILL)
        return await calls

    responses = asyncio.run(under_load())
    assert {response.status_code for response in responses} == {200}
    assert texts(responses) == expected


def test_an_error_in_the_stream_ends_only_its_own_request(service, server):
    first, second = problems(2, seed=6)
    prompt = chat_prompt_token_ids(server.tokenizer, messages_of(first))

    def misbehave(body):
        if body["prompt"][: len(prompt)] != prompt:
            return None
        return web.json_response({"error": {"message": "too long"}}, status=400)

    server.misbehave = misbehave
    failed, answered = asyncio.run(
        ask_all(service, [chat(problem.question, mode="off") for problem in (first, second)])
    )
    assert failed.status_code == 502 and "cannot read without" in failed.json()["error"]["message"]
    assert answered.status_code == 200
    server.misbehave = lambda body: None
    assert asyncio.run(service.ask(chat(first.question, mode="off"))).status_code == 200


def test_a_deployment_that_does_not_exist_replaces_nothing(deployed, service):
    before = asyncio.run(pids(service, "Verifier"))
    other = TARGET | {"engine": {"kind": "remote", "deployment": "llm/LLMServer:other"}}
    result = deployed.deploy(target=other)
    assert result.returncode == 1
    assert "the application 'llm' has no deployment 'LLMServer:other'; it has LLMServer:demo" in result.stderr
    assert asyncio.run(pids(service, "Verifier")) == before
