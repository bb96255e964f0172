"""A service whose target runs in another server, which can be restarted under load."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from aiohttp import web

from parse.demo import DEMO_TARGET
from tests.deployments.service.service_client import chat, problems
from tests.deployments.service.test_layouts import pids
from tests.deployments.service.test_service import client, library_answer, messages_of
from tests.parse.engines.remote.fake_vllm import FakeVLLM


@pytest.fixture(scope="module")
def server() -> Iterator[FakeVLLM]:
    server = FakeVLLM(DEMO_TARGET, max_model_len=1024)
    yield server
    server.close()


def remote_target(url: str) -> dict:
    return {"model": DEMO_TARGET, "max_model_len": 1024, "engine": {"kind": "remote", "url": url}}


def test_a_remote_target_serves_all_modes_and_survives_a_restart_of_its_server(deployed, server):
    service = deployed.service(target=remote_target(server.url))
    api, (problem, *others) = client(service), problems(4)
    answer = api.chat.completions.create(
        model="demo-target", messages=messages_of(problem), temperature=0, extra_body={"parse": {"mode": "off"}}
    )
    assert answer.choices[0].message.content == library_answer(problem)
    (card,) = httpx.get(f"{service.url}/v1/models").json()["data"]
    assert set(card["parse"]["modes"]) >= {"full", "rounds", "progressive", "exact", "off", "auto"}
    assert card["parse"]["methods"] == ["none"]
    (verifier,) = asyncio.run(service.describe("Verifier"))
    assert (verifier.device, verifier.visible_gpus) == ("remote", "")

    async def under_load():
        modes = ["off", "full", "rounds", "exact"] * 2
        bodies = [chat(problem.question, mode=mode) for problem in others for mode in modes[:3]]
        expected = [await service.answer(body) for body in bodies]
        calls = [asyncio.create_task(service.ask(body)) for body in bodies]
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.stop)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(server.start)
        return expected, await asyncio.gather(*calls)

    expected, responses = asyncio.run(under_load())
    assert {response.status_code for response in responses} == {200}
    texts = [response.json()["choices"][0]["message"]["content"] for response in responses]
    assert texts == [answer["choices"][0]["message"]["content"] for answer in expected]


def test_an_unreachable_server_is_reported(deployed, server):
    service = deployed.service(target=remote_target(server.url))

    def failing_servers():
        lines = httpx.get(f"{service.url}/metrics").text.splitlines()
        return [
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("parse_engine_servers{")
            and 'deployment="Verifier"' in line
            and 'state="failing"' in line
        ]

    async def ready_status(expected):
        async with httpx.AsyncClient(timeout=10) as http:
            while (response := await http.get(f"{service.url}/ready")).status_code != expected:
                await asyncio.sleep(0.2)
            return response.json()

    assert failing_servers() == [0.0]
    server.stop()
    try:
        content = asyncio.run(ready_status(503))
        assert content["status"] == "unavailable" and server.url in content["troubles"]["verifier"]
        assert failing_servers() == [1.0]
    finally:
        server.start()
    assert asyncio.run(ready_status(200))["troubles"] == {}
    assert failing_servers() == [0.0]


def test_an_error_of_the_server_reaches_the_client(deployed, server):
    service = deployed.service(target=remote_target(server.url))
    (problem,) = problems(1)
    error = {"error": {"message": "out of order"}}
    server.misbehave = lambda body: web.json_response(error, status=500) if body.get("stream") else None
    try:
        response = asyncio.run(service.ask(chat(problem.question, mode="off")))
    finally:
        server.misbehave = lambda body: None
    assert response.status_code == 502 and "out of order" in response.json()["error"]["message"]
    assert asyncio.run(service.ask(chat(problem.question, mode="off"))).status_code == 200


def test_a_server_that_cannot_be_used_replaces_nothing(deployed, server):
    service = deployed.service(target=remote_target(server.url))
    before = asyncio.run(pids(service, "Verifier"))
    result = deployed.deploy(target=remote_target("http://127.0.0.1:9"))
    assert result.returncode == 1 and "target: " in result.stderr and "http://127.0.0.1:9: " in result.stderr
    assert asyncio.run(pids(service, "Verifier")) == before
    (problem,) = problems(1)
    assert asyncio.run(service.ask(chat(problem.question, mode="off"))).status_code == 200
    deployed.clear()
