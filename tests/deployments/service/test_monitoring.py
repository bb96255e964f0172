"""Monitors a deployment under a mixed load with a real Prometheus.

It reads the metrics from both sources.
"""

import asyncio
import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deployments.serving.metrics_collection import SCRAPE_TIMEOUT_S
from parse.demo import DEMO_TARGET
from tests.cluster.querying import (
    LabeledQuery,
    Prometheus,
    alert_queries,
    dashboard_queries,
    needs_prometheus,
    prometheus,
    recorded_queries,
)
from tests.deployments.service.conftest import SMALL
from tests.deployments.service.service_client import ServiceClient, chat, events, problems, until

PLACES = LabeledQuery("answers of the router", "parse_places")
IN_TIME_S = 5.0  # half of the default timeout of Prometheus
QUICKLY_S = 60.0
SCRAPE_INTERVAL = (
    "5s"  # Ray's endpoint, which also has the metrics of all stopped replicas, can take more than a second
)
MODES = ("full", "rounds", "progressive", "exact", "off", "auto")
CHOICES = (None, "ngram", "none", None)
SPECULATIVE_CONFIGS = [{"method": "parallel", "model": "models/demo-parallel"}, {"method": "ngram"}]
TARGET = {"model": DEMO_TARGET, **SMALL, "speculative_configs": SPECULATIVE_CONFIGS}
SETTINGS = {
    "target": TARGET,
    "audit": {"share": 1.0, "result": r"\d+"},
    "api": {"max_answers": 4, "max_queued_requests": 4, "request_timeout_s": 60.0},
}


class ClientTotals:
    """The sums of the responses that clients received."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.by_method: Counter[tuple[str, str]] = Counter()

    def answer(self, report: dict, usage: dict) -> None:
        self.requests["ok"] += 1
        for name in ("drafted", "accepted", "rejected", "written"):
            self.tokens[f"parse_{name}_tokens_total"] += report[name]
        self.tokens["parse_prompt_tokens_total"] += usage["prompt_tokens"]
        self.tokens["parse_cached_prompt_tokens_total"] += usage["prompt_tokens_details"]["cached_tokens"]
        if speculation := report["speculation"]:
            for metric, name in (
                ("target_passes", "passes"),
                ("target_pass_tokens", "tokens"),
                ("proposed_tokens", "proposed"),
                ("proposed_accepted_tokens", "accepted"),
            ):
                self.by_method[f"parse_{metric}_total", speculation["method"]] += speculation[name]


async def send_request(
    client: httpx.AsyncClient, client_totals: ClientTotals, prompt: str, mode: str, number: int
) -> None:
    body = chat(prompt, mode=mode)
    body["parse"]["speculation"] = CHOICES[number % len(CHOICES)]
    if number % 9 == 8:  # the client disconnects
        try:
            await client.post("/v1/chat/completions", json=body, timeout=0.02)
        except httpx.TimeoutException:
            return
    if number % 2:
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code == 200:
            client_totals.answer(response.json()["parse"], response.json()["usage"])
        else:
            assert response.status_code == 503, response.text
        return
    final_chunks: dict = {}
    stream = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=stream) as response:
        if response.status_code != 200:
            assert response.status_code == 503
            return
        async for event in events(response):
            final_chunks |= {name: event[name] for name in ("parse", "usage") if event.get(name)}
    client_totals.answer(final_chunks["parse"], final_chunks["usage"])


async def load(service: ServiceClient, client_totals: ClientTotals) -> None:
    """Sends bursts of too many requests and some faulty ones, with pauses for audits."""
    rng = random.Random(7)
    load_problems = problems(72, seed=9)
    async with service.client() as client:
        for burst in range(6):
            batch = load_problems[12 * burst : 12 * burst + 12]
            await asyncio.gather(
                *(
                    send_request(client, client_totals, problem.question, rng.choice(MODES), n)
                    for n, problem in enumerate(batch)
                )
            )
            await client.post("/v1/chat/completions", json={"surprise": 1})
            if burst == 2:
                (drafter,) = await service.describe("Drafter")
                os.kill(drafter.pid, signal.SIGKILL)
                await asyncio.gather(
                    *(send_request(client, client_totals, problem.question, "full", 1) for problem in batch[:3])
                )
            if burst == 3:
                (verifier,) = await service.describe("Verifier")
                task = asyncio.create_task(send_request(client, client_totals, batch[0].question, "off", 1))
                await asyncio.sleep(0.1)
                os.kill(verifier.pid, signal.SIGKILL)
                await task
            await asyncio.sleep(2.0)


def total(watching: Prometheus, query: str) -> float:
    return sum(float(sample["value"][1]) for sample in watching.query(query))


@needs_prometheus
def test_every_query_of_dashboards_and_alerts_returns_data(deployed, cluster, tmp_path):
    service = deployed.service(**SETTINGS)
    client_totals = ClientTotals()
    before = httpx.get(f"{service.url}/metrics").text
    assert 'outcome="ok"' in before
    port = service.url.removeprefix("http://")
    with prometheus(tmp_path, port, cluster.metrics, interval=SCRAPE_INTERVAL) as watching:
        asyncio.run(load(service, client_totals))
        for prefix in ("", "ray_"):
            queries = [*dashboard_queries(prefix=prefix), *recorded_queries(prefix=prefix)]
            assert len(queries) > 60
            empty = watching.without_data(queries, within_s=QUICKLY_S)
            assert not empty, [(query.label, query.expression) for query in empty]
        empty = watching.without_data(alert_queries(), within_s=QUICKLY_S)
        assert not empty, [(query.label, query.expression) for query in empty]
        assert watching.rule_faults() == []

        # Clients and Prometheus have counted the same, in both sources. Ray still exports routers that have stopped.
        assert not watching.without_data([PLACES], within_s=QUICKLY_S)  # a scrape can fail while the machine is busy
        (router,) = {sample["metric"]["replica"] for sample in watching.query(PLACES.expression)}
        counts = [(name, "", n) for name, n in client_totals.tokens.items()]
        counts += [(name, f'method="{method}",', n) for (name, method), n in client_totals.by_method.items()]
        counts += [("parse_requests_total", 'outcome="ok",', client_totals.requests["ok"])]
        expected = {
            f'{prefix}{name}{{{condition}replica="{router}"}}': float(n)
            for name, condition, n in counts
            for prefix in ("", "ray_")
        }

        def differences() -> dict[str, tuple[float, float]]:
            totals = {query: total(watching, query) for query in expected}
            return {query: (totals[query], n) for query, n in expected.items() if totals[query] != n}

        async def equal() -> bool:
            return not differences()

        try:
            asyncio.run(until(equal))
        except AssertionError:
            raise AssertionError(differences()) from None
    assert {method for _, method in client_totals.by_method} == {"parallel", "ngram"}
    assert client_totals.requests["ok"] > 40 and client_totals.tokens["parse_rejected_tokens_total"] > 100


def reports(text: str) -> Counter[str]:
    """Returns how many replicas of each deployment report metrics."""
    replicas = {
        (sample.labels["deployment"], sample.labels["replica"])
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return Counter(deployment for deployment, _ in replicas)


def unreached(text: str) -> float:
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "parse_unreached_replicas_total")


def test_a_scrape_returns_all_replicas_and_a_hanging_one_does_not_delay_it(deployed):
    service = deployed.service(deployments=[{"name": "Router", "num_replicas": 2}], target=TARGET)

    async def load_problems():
        client_totals = ClientTotals()
        async with service.client() as client:
            await asyncio.gather(
                *(send_request(client, client_totals, problem.question, "full", 1) for problem in problems(8))
            )
            assert client_totals.requests["ok"] == 8

            async def all_reported(counts: dict[str, int]) -> bool:
                return reports((await client.get("/metrics")).text) == counts

            await until(lambda: all_reported({"Router": 2, "Verifier": 1, "Drafter": 1}))
            for _ in range(6):  # the result does not depend on the router that responds
                text = (await client.get("/metrics")).text
                samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
                drafted = sum(s.value for s in samples if s.name == "parse_drafted_tokens_total")
                assert drafted == client_totals.tokens["parse_drafted_tokens_total"]
            (drafter,) = await service.describe("Drafter")
            os.kill(drafter.pid, signal.SIGSTOP)
            try:
                response = await client.get("/metrics", timeout=IN_TIME_S)
                assert reports(response.text) == {"Router": 2, "Verifier": 1}
                await until(lambda: counted(client))
            finally:
                os.kill(drafter.pid, signal.SIGKILL)  # a stopped replica is left out too
            response = await client.get("/metrics", timeout=IN_TIME_S)
            assert response.status_code == 200 and reports(response.text)["Verifier"] == 1
            await until(lambda: all_reported({"Router": 2, "Verifier": 1, "Drafter": 1}))

    async def counted(client: httpx.AsyncClient) -> bool:
        return unreached((await client.get("/metrics", timeout=IN_TIME_S)).text) > 0

    assert SCRAPE_TIMEOUT_S < IN_TIME_S
    asyncio.run(load_problems())


def test_the_log_has_one_line_per_request_with_its_id(deployed, cluster):
    service = deployed.service()

    async def load_problems() -> str:
        async with service.client() as client:
            response = await client.post("/v1/chat/completions", json=chat("Xylophone?", mode="off", max_tokens=4))
            request_id = response.headers["x-request-id"]
            assert "," not in request_id  # each request is logged once

            async def is_logged() -> bool:
                return any(line.get("request_id") == request_id and "outcome" in line for line in lines(cluster.logs))

            await until(is_logged)
            return str(request_id)

    request_id = asyncio.run(load_problems())
    (line,) = [line for line in lines(cluster.logs) if line.get("request_id") == request_id and "outcome" in line]
    assert line["outcome"] == "ok" and line["status"] == 200 and line["written"] == 4 and line["mode"] == "off"
    assert not any("Xylophone" in path.read_text() for path in cluster.logs.glob("replica_*"))


def lines(logs: Path) -> list[dict]:
    return [
        json.loads(line)
        for path in logs.glob("replica_parse_Router_*.log")
        for line in path.read_text().splitlines()
        if line.startswith("{")
    ]
