"""A service whose replica starts and supervises the vLLM server of the target."""

import asyncio
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from parse.demo import DEMO_TARGET
from tests.deployments.service.service_client import chat, problems, until
from tests.deployments.service.test_layouts import pids
from tests.parse.engines.vllm.fake_cli import write_executable


@pytest.fixture(scope="module")
def executable(tmp_path_factory):
    return write_executable(tmp_path_factory.mktemp("vllm"))


def options(executable: str, **engine_args: Any) -> dict[str, Any]:
    engine = {"kind": "vllm", "executable": executable, "engine_args": engine_args}
    resources = {"ray_actor_options": {"num_cpus": 0.3, "num_gpus": 0}}
    return {
        "deployments": [{"name": "Verifier"} | resources],
        "target": {"model": DEMO_TARGET, "max_model_len": 1024, "engine": engine},
    }


def processes(executable: str) -> dict[str, psutil.Process]:
    """Returns the replica, the two supervisors, the server, and the process that it has started, if all run."""
    with suppress(psutil.Error, ValueError):
        commands = {p: " ".join(p.cmdline()) for p in psutil.process_iter()}
        outer, inner = (p for p, command in commands.items() if "supervisor.py" in command and executable in command)
        (server,) = inner.children()
        (other,) = server.children()
        return {"replica": outer.parent(), "outer": outer, "inner": inner, "server": server, "other": other}
    return {}


def test_whatever_is_killed_no_request_is_lost_and_no_process_remains(deployed, executable):
    """tests/parse/engines/vllm/test_vllm_engine.py kills the supervisors too."""
    service = deployed.service(**options(executable))
    bodies = [chat(problem.question, mode=mode) for problem in problems(2) for mode in ("off", "full", "rounds")]
    has_ended = asyncio.Event()

    async def ask(body):
        answers: set[str] = set()
        while not has_ended.is_set() or not answers:
            answer = await service.answer(body)
            answers.add(answer["choices"][0]["message"]["content"])
        return answers

    async def serves():
        async with service.client() as http:
            is_ready = (await http.get("/ready")).status_code == 200
        running = processes(executable)
        command = running["server"].cmdline() if running else ["--uds", ""]
        return is_ready and Path(command[command.index("--uds") + 1]).is_socket()

    async def under_load():
        loads = [asyncio.create_task(ask(body)) for body in bodies]
        for names in (["server", "replica"], ["replica"], ["server"]):
            await until(serves)
            await asyncio.sleep(2.0)  # a replica that starts would fail, instead of starting its server again
            before = processes(executable)
            for name in names:
                before[name].kill()
            ended = [p for name, p in before.items() if name != "replica" or name in names]

            async def have_ended(ended=ended):
                return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in ended)

            await until(have_ended)
        has_ended.set()
        return await asyncio.gather(*loads)

    for answers in asyncio.run(under_load()):
        assert len(answers) == 1

    asyncio.run(until(serves))
    metrics = httpx.get(f"{service.url}/metrics").text
    restarts = re.findall(r'^parse_engine_server_restarts_total\{[^}]*"Verifier"[^}]*\} (\S+)$', metrics, re.MULTILINE)
    assert restarts == ["1.0"] and "vllm:num_requests_running{" in metrics
    # When Ray ends the replica, it also kills the direct children of its process.
    before = processes(executable)
    deployed.clear()

    async def have_all_ended():
        return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in before.values())

    asyncio.run(until(have_all_ended))


def test_an_argument_that_vllm_does_not_know_replaces_nothing(deployed, executable):
    service = deployed.service(**options(executable))
    before = asyncio.run(pids(service, "Verifier"))
    result = deployed.deploy(**options(executable, tensor_paralel_size=2))
    assert result.returncode == 1 and "error: unrecognized arguments: --tensor-paralel-size" in result.stderr
    assert asyncio.run(pids(service, "Verifier")) == before


def test_a_vllm_that_cannot_start_replaces_nothing(deployed, executable, tmp_path):
    """vLLM accepts these arguments, and would fail again and again when it loads the model."""
    service = deployed.service(**options(executable))
    before = asyncio.run(pids(service, "Verifier"))

    async def deploy_under_load():
        deployment = asyncio.create_task(
            asyncio.to_thread(deployed.deploy, **options(executable, fail_if_exists=str(tmp_path)))
        )
        num_answers = 0
        while not deployment.done():
            await service.answer(chat(problems(1)[0].question, mode="off"))  # raises if there is no answer
            num_answers += 1
        return deployment.result(), num_answers

    result, num_answers = asyncio.run(deploy_under_load())
    assert (
        result.returncode == 1 and "vLLM does not start (exit code 1): ValueError: No memory is left" in result.stderr
    )
    assert asyncio.run(pids(service, "Verifier")) == before and num_answers > 0

    async def no_second_server_is_left():
        return processes(executable).get("replica", psutil.Process()).pid in before

    asyncio.run(until(no_second_server_is_left))
    deployed.clear()
