"""Tests deployments that differ from the default one.

They have several replicas, tight limits, changes under load, or impossible requirements.
"""

import asyncio
import shutil
from itertools import count

from parse.demo import DEMO_DRAFT, DEMO_TARGET
from tests.deployments.service.conftest import SMALL
from tests.deployments.service.service_client import chat, problems

TIGHT = {"api": {"max_answers": 4, "max_queued_requests": 8}}
TWO_OF_EACH = [
    {"name": name, "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1, "num_gpus": 0.5}}
    for name in ("Verifier", "Drafter")
]


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
        assert refused.json()["error"]["code"] == "overloaded" and int(refused.headers["Retry-After"]) >= 1
    assert {answer.status_code for answer in afterwards} == {200}
    asyncio.run(service.wait_until_idle())


def test_a_conversation_uses_the_verifier_that_has_cached_it(deployed):
    deployed.clear()  # Serve would start new replicas before it stops the old ones, and no GPU is left for them
    service = deployed.service(TWO_OF_EACH)

    async def conversations():
        token_counts, (first_tokens, second_tokens) = (
            [],
            [stats.num_tokens for stats in await service.stats("Verifier")],
        )
        for problem in problems(60, seed=17):
            body = chat(problem.question, mode="rounds")
            first = await service.answer(body)
            answer_message = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
            again = body["messages"] + [answer_message, {"role": "user", "content": problem.question}]
            second = await service.answer(body | {"messages": again, "max_tokens": 20})
            token_counts.append(
                (first["usage"]["prompt_tokens"], second["usage"]["prompt_tokens_details"]["cached_tokens"])
            )
            num_tokens = [stats.num_tokens for stats in await service.stats("Verifier")]
            if len(token_counts) >= 8 and min(num_tokens) > max(
                first_tokens, second_tokens
            ):  # both verifiers had conversations
                return token_counts
        raise AssertionError("one of the two had nothing to do")

    token_counts = asyncio.run(conversations())
    assert all(cached >= prompt - 1 for prompt, cached in token_counts)
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
