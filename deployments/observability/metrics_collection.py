"""The figures of all replicas of a deployment, fetched from each."""

import asyncio
from collections.abc import Mapping

from ray.serve.handle import DeploymentHandle

from deployments.observability import metrics
from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metrics import MetricsRecorder
from deployments.serving.calls import NO_REQUEST, run_in_fresh_context

SCRAPE_TIMEOUT_S = 1.0  # Prometheus has as much as ten times that, and should hear of the others


async def collect_replica_metrics(
    handles: Mapping[str, DeploymentHandle], recorder: MetricsRecorder
) -> list[ReplicaMetrics]:
    """Whoever does not answer in time is left out, and counted."""
    results = await asyncio.gather(*(_collect_from_deployment(handle) for handle in handles.values()))
    for name, (_, missing) in zip(handles, results, strict=True):
        recorder.add(metrics.UNREACHED_REPLICAS, missing, part=name)
    return [metrics_of_replica for collected, _ in results for metrics_of_replica in collected]


async def _collect_from_deployment(handle: DeploymentHandle) -> tuple[list[ReplicaMetrics], int]:
    """And how many are missing."""
    try:
        async with asyncio.timeout(SCRAPE_TIMEOUT_S):
            broadcast = run_in_fresh_context(NO_REQUEST, handle.broadcast, "collect_metrics")
            # What the class offers in public waits for all of them, or for none.
            replicas = await broadcast._fetch_replica_results_async()
    except Exception:  # there are none, or they are not known at the moment
        return [], 1
    if not replicas:
        return [], 1
    tasks = [asyncio.ensure_future(replica.get_async()) for replica in replicas]
    try:
        await asyncio.wait(tasks, timeout=SCRAPE_TIMEOUT_S)
        collected = [
            task.result() for task in tasks if task.done() and not task.cancelled() and task.exception() is None
        ]
    finally:  # also where the scrape itself is given up
        for task in tasks:
            task.cancel()
    return collected, len(tasks) - len(collected)
