"""Collects metrics from replicas that respond, hang, fail or do not exist."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deployments.observability.exposition import ReplicaLabels, ReplicaMetrics
from deployments.observability.metrics import ROUTER_METRICS, MetricsRecorder
from deployments.serving.metrics_collection import collect_replica_metrics

HERE = ReplicaMetrics(ReplicaLabels("farm", "Verifier", "a"), [])


class Replica:
    """The replica's end of a call, like in Ray Serve's handle."""

    def __init__(self, answer: Callable[[], Awaitable[ReplicaMetrics]]) -> None:
        self.answer, self.given_up = answer, False

    async def get_async(self) -> ReplicaMetrics:
        try:
            return await self.answer()
        except asyncio.CancelledError:
            self.given_up = True
            raise


class Handle:
    def __init__(self, *replicas: Replica) -> None:
        self.replicas = replicas

    def broadcast(self, method: str) -> Any:
        assert method == "collect_metrics"
        return self

    async def _fetch_replica_results_async(self) -> tuple[Replica, ...]:
        return self.replicas


async def at_once() -> ReplicaMetrics:
    return HERE


async def never() -> ReplicaMetrics:
    await asyncio.Event().wait()
    raise AssertionError


async def failing() -> ReplicaMetrics:
    raise ConnectionError("gone")


def unreached(recorder: MetricsRecorder) -> dict[str, float]:
    return {
        sample.labels["part"]: sample.value
        for family in recorder.collect().families
        for sample in family.samples
        if sample.name == "parse_unreached_replicas_total" and sample.value
    }


@pytest.fixture
def recorder() -> MetricsRecorder:
    return MetricsRecorder(ROUTER_METRICS, deployment="Router")


def test_replicas_that_do_not_respond_are_counted_and_cancelled(recorder, monkeypatch):
    monkeypatch.setattr("deployments.serving.metrics_collection.SCRAPE_TIMEOUT_S", 0.02)
    hanging = Replica(never)
    handles: Any = {"Verifier": Handle(Replica(at_once), hanging, Replica(failing)), "Drafter": Handle()}

    async def seen() -> None:
        assert await collect_replica_metrics(handles, recorder) == [HERE]
        await asyncio.sleep(0)

    asyncio.run(seen())
    assert hanging.given_up and unreached(recorder) == {"Verifier": 2.0, "Drafter": 1.0}


def test_a_cancelled_scrape_cancels_its_calls(recorder):
    hanging = Replica(never)
    handles: Any = {"Verifier": Handle(hanging)}

    async def seen() -> None:
        scrape = asyncio.create_task(collect_replica_metrics(handles, recorder))
        await asyncio.sleep(0.01)
        scrape.cancel()
        await asyncio.gather(scrape, return_exceptions=True)
        await asyncio.sleep(0)
        assert hanging.given_up

    asyncio.run(seen())
    assert unreached(recorder) == {}
