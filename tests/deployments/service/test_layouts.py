"""Other ways to deploy it: several replicas, tight limits, changes under load, and what no cluster can place."""

import asyncio
from itertools import count

from parse.local import DEMO_DRAFT, DEMO_TARGET
from tests.deployments.service.asking import chat, problems
from tests.deployments.service.conftest import SMALL

TIGHT = {"api": {"max_answers": 4, "max_waiting": 8}}
TWO_OF_EACH = [
    {"name": name, "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1, "num_gpus": 0.5}}
    for name in ("Verifier", "Drafter")
]


def test_under_tight_limits_many_clients_get_answers_or_are_told_to_come_again(deployed):
    service = deployed.service(**TIGHT)

    async def storm():
        bodies = [chat(problem.question) for problem in problems(50)]
        answers = await asyncio.gather(*(service.ask(body) for body in bodies))
        afterwards = [await service.ask(body) for body in bodies[:8]]
        together = await asyncio.gather(*(service.ask(body) for body in bodies[:12]))
        return answers, [*afterwards, *together]

    answers, afterwards = asyncio.run(storm())
    assert {answer.status_code for answer in answers} == {200, 503}
    assert sum(answer.status_code == 200 for answer in answers) >= 12  # worked on, or waiting
    for refused in (answer for answer in answers if answer.status_code == 503):
        assert refused.json()["error"]["code"] == "overloaded" and int(refused.headers["Retry-After"]) >= 1
    assert {answer.status_code for answer in afterwards} == {200}
    asyncio.run(service.comes_to_rest())


def test_of_several_verifiers_a_conversation_meets_the_one_that_knows_it(deployed):
    deployed.clear()  # Serve would start new replicas beside the old ones, and has no GPU left for that
    service = deployed.service(TWO_OF_EACH)

    async def conversations():
        known, (one, other) = [], [load.tokens for load in await service.loads("Verifier")]
        for problem in problems(60, seed=17):
            body = chat(problem.question, mode="rounds")
            first = await service.answer(body)
            said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
            again = body["messages"] + [said, {"role": "user", "content": problem.question}]
            second = await service.answer(body | {"messages": again, "max_tokens": 20})
            known.append((first["usage"]["prompt_tokens"], second["usage"]["prompt_tokens_details"]["cached_tokens"]))
            now = [load.tokens for load in await service.loads("Verifier")]
            if len(known) >= 8 and min(now) > max(one, other):  # both had conversations of their own
                return known
        raise AssertionError("one of the two had nothing to do")

    known = asyncio.run(conversations())
    assert all(cached >= prompt - 1 for prompt, cached in known)
    asyncio.run(service.comes_to_rest())


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
    assert not before & after  # all of it is new
    assert len(answers) > 20 and {answer.status_code for answer in answers} == {200}
    asyncio.run(service.comes_to_rest())


async def pids(service, name):
    return [replica.pid for replica in await service.describe(name)]


def test_what_cannot_be_placed_or_is_not_known_is_said(deployed):
    greedy = [{"name": "Verifier", "ray_actor_options": {"num_cpus": 0.1, "num_gpus": 3}}]
    told = deployed.deploy(greedy)
    assert told.returncode == 1
    assert "a replica of Verifier needs 3 GPU, and no node has more than 2" in told.stderr
    wrong = deployed.deploy(method={"strude": 3})
    assert wrong.returncode == 1 and "method.strude: Extra inputs are not permitted" in wrong.stderr
    nowhere = deployed.deploy(target={"model": "/no/such/folder"})
    assert nowhere.returncode == 1 and "/no/such/folder" in nowhere.stderr
