"""Tests deployments that differ from the default one.

They have tight limits, changes under load, or impossible requirements.
"""

import asyncio
import os
import shutil
import signal
from itertools import count

from parse.demo import DEMO_DRAFT, DEMO_TARGET
from tests.deployments.service.conftest import SMALL
from tests.deployments.service.service_client import chat, problems, until

TIGHT = {"api": {"max_answers": 4, "max_queued_requests": 8, "request_timeout_s": 20.0}}


def test_with_tight_limits_clients_get_answers_or_a_503(deployed):
    service = deployed.service(**TIGHT)

    async def storm():
        bodies = [chat(problem.question) for problem in problems(50)]
        answers = await asyncio.gather(*(service.ask(body) for body in bodies))
        afterwards = [await service.ask(body) for body in bodies[:8]]
        together = await asyncio.gather(*(service.ask(body) for body in bodies[:12]))
        return answers, [*afterwards, *together]

    answers, afterwards = asyncio.run(storm())
    assert {answer.status_code for answer in answers} == {200, 503}
    assert sum(answer.status_code == 200 for answer in answers) >= 12  # these run or wait
    for refused in (answer for answer in answers if answer.status_code == 503):
        seconds, error = int(refused.headers["Retry-After"]), refused.json()["error"]
        message = f"too many requests are waiting; try again in {seconds} s"
        assert seconds >= 1
        assert error == {"message": message, "type": "server_error", "param": None, "code": "overloaded"}
    assert {answer.status_code for answer in afterwards} == {200}
    asyncio.run(service.wait_until_idle())


def test_a_hung_verifier_is_reported_and_serves_again_when_it_continues(deployed):
    service = deployed.service(**TIGHT)
    body = chat(problems(1)[0].question)

    async def hang():
        async with service.client() as client:

            async def has_status(status):
                return (await client.get("/ready")).json()["status"] == status

            (verifier,) = await service.describe("Verifier")
            os.kill(verifier.pid, signal.SIGSTOP)
            try:
                request = asyncio.create_task(service.ask(body))
                await until(lambda: has_status("unavailable"))
                readiness = await client.get("/ready")
                assert readiness.status_code == 503 and list(readiness.json()["troubles"]) == ["verifier"]
                late = await request
                assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
            finally:
                os.kill(verifier.pid, signal.SIGCONT)
            await until(lambda: has_status("ready"))
        assert (await service.answer(body))["choices"][0]["finish_reason"] == "stop"
        assert await pids(service, "Verifier") == [verifier.pid]  # it was not replaced

    asyncio.run(hang())
    asyncio.run(service.wait_until_idle())


def test_a_change_under_load_loses_no_request(deployed):
    service = deployed.service()

    async def load(changing):
        answers = []

        async def client(seed):
            for number in count():
                (problem,) = problems(1, seed=100 * seed + number)
                answers.append(await service.ask(chat(problem.question, mode="auto")))
                if changing.done():
                    return

        await asyncio.gather(*(client(seed) for seed in range(6)))
        return answers

    async def changed():
        target, draft = {"model": DEMO_TARGET, **SMALL}, {"model": DEMO_DRAFT, **SMALL}
        more = {
            "target": target | {"max_num_seqs": 31},
            "draft": draft | {"max_num_seqs": 31},
            "verification": {"stride": 6},
        }
        changing = asyncio.create_task(asyncio.to_thread(deployed.service, **more))
        answers = await load(changing)
        await changing
        return answers

    before = {pid for name in ("Verifier", "Drafter", "Router") for pid in asyncio.run(pids(service, name))}
    answers = asyncio.run(changed())
    after = {pid for name in ("Verifier", "Drafter", "Router") for pid in asyncio.run(pids(service, name))}
    assert not before & after  # only new replicas remain
    assert len(answers) > 20 and {answer.status_code for answer in answers} == {200}
    asyncio.run(service.wait_until_idle())


async def pids(service, name):
    return [replica.pid for replica in await service.describe(name)]


def test_impossible_resources_and_unknown_keys_are_reported(deployed):
    too_many_gpus = [{"name": "Verifier", "ray_actor_options": {"num_cpus": 0.1, "num_gpus": 3}}]
    result = deployed.deploy(too_many_gpus)
    assert result.returncode == 1
    assert "a replica of Verifier needs 3 GPU, and no node has more than 2" in result.stderr
    misspelled = deployed.deploy(verification={"strude": 3})
    assert misspelled.returncode == 1
    assert "verification.strude is not known; did you mean stride?" in misspelled.stderr
    renamed = deployed.deploy(target={"model": DEMO_TARGET, "memory_mb": 512})
    assert renamed.returncode == 1
    assert "target.memory_mb was renamed to target.kv_cache_memory_bytes; multiply by 1048576" in renamed.stderr


def test_a_deployment_that_cannot_work_replaces_nothing(deployed, tmp_path):
    service = deployed.service()
    damaged = shutil.copytree(DEMO_TARGET, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:1000])
    failures = {
        "/no/such/folder": "target: /no/such/folder is not a folder",
        str(damaged): "model.safetensors is damaged or incomplete",
    }

    async def load(changing):
        statuses: list[int] = []
        while not changing.done():
            bodies = [chat(problem.question) for problem in problems(4, seed=len(statuses))]
            statuses += [answer.status_code for answer in await asyncio.gather(*map(service.ask, bodies))]
        return statuses

    async def deploy_under_load(model):
        changing = asyncio.create_task(asyncio.to_thread(deployed.deploy, target={"model": model, **SMALL}))
        statuses = await load(changing)
        async with service.client() as client:
            ready = await client.get("/ready")
        return changing.result(), statuses, ready

    before = {pid for name in ("Verifier", "Drafter", "Router") for pid in asyncio.run(pids(service, name))}
    for model, message in failures.items():
        result, statuses, ready = asyncio.run(deploy_under_load(model))
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
        assert statuses and set(statuses) == {200}
        assert ready.status_code == 200 and message in ready.json()["deployment"]
    assert before == {pid for name in ("Verifier", "Drafter", "Router") for pid in asyncio.run(pids(service, name))}
    deployed.clear()  # the next test deploys a configuration that works
