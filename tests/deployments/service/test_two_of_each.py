"""Tests a deployment with two replicas of each kind on two nodes.

One replica may fail, and one node may be drained.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import ray
from ray.util.state import list_actors

from tests.deployments.service.service_client import chat, problems, until

RAY = Path(sys.executable).with_name("ray")
QUICK_HEALTH_CHECKS = {"health_check_period_s": 1, "health_check_timeout_s": 3, "graceful_shutdown_timeout_s": 1}
TWO_OF_EACH = [
    {"name": "Router", "num_replicas": 2},
    *(
        {"name": name, "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1, "num_gpus": 0.5}} | QUICK_HEALTH_CHECKS
        for name in ("Verifier", "Drafter")
    ),
]
NAMES = ("Router", "Verifier", "Drafter")


def alive_nodes():
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@pytest.fixture(scope="module")
def second_node(cluster):
    """The id of a second node on this machine."""
    before = alive_nodes()
    options = ["--num-cpus", "4", "--num-gpus", "2", "--object-store-memory", str(100 * 2**20)]
    with subprocess.Popen(
        [RAY, "start", "--address", cluster.address, "--block", "--disable-usage-stats", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as node:
        try:

            async def is_alive():
                return alive_nodes() > before

            asyncio.run(until(is_alive))
            (node_id,) = alive_nodes() - before
            yield node_id
        finally:
            node.terminate()
            node.wait(60)


@pytest.fixture(scope="module")
def service(deployed, second_node):
    deployed.clear()  # Serve would start new replicas before it stops the old ones, and no GPU is left for them
    yield deployed.service(TWO_OF_EACH)
    deployed.clear()


def test_a_conversation_uses_the_verifier_that_has_cached_it(service):
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


def long_chat(prompt):
    return chat(prompt, mode="off", max_tokens=800, ignore_eos=True)


def test_the_requests_of_a_hung_verifier_continue_on_the_other_one(service):
    async def send(body):
        answer = await service.answer(body)
        return answer["parse"]["retries"], answer["choices"][0]["finish_reason"]

    async def both_run():
        return all(stats.num_running for stats in await service.stats("Verifier"))

    async def hang():
        hung, other = await service.describe("Verifier")
        long_bodies = [long_chat(problem.question) for problem in problems(12)]
        requests = asyncio.gather(*map(send, long_bodies))
        await until(both_run)
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            new_bodies = [chat(problem.question) for problem in problems(12)]
            new_answers = await asyncio.gather(*map(send, new_bodies))
            answers = await requests
        finally:
            with suppress(ProcessLookupError):
                os.kill(hung.pid, signal.SIGCONT)
        pids = {verifier.pid for verifier in await service.describe("Verifier")}
        assert other.pid in pids and hung.pid not in pids
        return answers, new_answers

    answers, new_answers = asyncio.run(hang())
    assert {finish_reason for _, finish_reason in answers} == {"length"}
    assert {retries for retries, _ in answers} == {0, 1}  # only those of one verifier are repeated
    assert {finish_reason for _, finish_reason in new_answers} == {"stop"}


def test_a_drained_node_loses_no_request(service, cluster, second_node):
    def replica_counts():
        """Returns the number of replicas of each deployment on each node."""
        actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
        replicas = [(actor.class_name.rpartition(":")[2], actor.node_id) for actor in actors]
        return Counter(replica for replica in replicas if replica[0] in NAMES)

    async def is_drained():
        counts = await asyncio.to_thread(replica_counts)
        return all(node != second_node for _, node in counts)

    async def load(draining):
        answers = []

        async def client(seed):
            for number in count():
                (problem,) = problems(1, seed=100 * seed + number)
                answers.append(await service.ask(chat(problem.question, mode="auto")))
                if draining.done():
                    return

        await asyncio.gather(*(client(seed) for seed in range(4)))
        return answers

    async def drain():
        command = [RAY, "drain-node", "--address", cluster.address, "--node-id", second_node]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        command += ["--deadline-remaining-seconds", "120"]
        await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
        await until(is_drained)

    async def drained():
        draining = asyncio.create_task(drain())
        answers = await load(draining)
        await draining
        return answers

    assert any(node == second_node for _, node in replica_counts())
    answers = asyncio.run(drained())
    assert len(answers) > 10 and {answer.status_code for answer in answers} == {200}
    assert Counter(name for name, _ in replica_counts().elements()) == dict.fromkeys(NAMES, 2)


def test_a_killed_router_loses_its_own_requests_only(service):
    # Both routers are on the first node since the second one was drained. The proxy prefers routers on its own node.
    body = long_chat(problems(1)[0].question)

    async def both_routers_run():
        return len(await service.describe("Router")) == 2

    async def ask():
        await until(both_routers_run)  # the test before this one has moved one of them
        async with service.client() as client:
            requests = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(9)]

            async def all_run():
                loads = await service.stats("Verifier")
                return sum(load.num_running + load.num_waiting for load in loads) == len(requests)

            await until(all_run)
            router, _ = await service.describe("Router")
            os.kill(router.pid, signal.SIGKILL)
            new = await asyncio.gather(
                *(client.post("/v1/chat/completions", json=chat(p.question)) for p in problems(6))
            )
            return await asyncio.gather(*requests), new

    answers, new = asyncio.run(ask())
    assert {answer.status_code for answer in answers} == {200, 500}
    assert all(answer.json()["usage"]["completion_tokens"] == 800 for answer in answers if answer.status_code == 200)
    assert {answer.status_code for answer in new} == {200}
