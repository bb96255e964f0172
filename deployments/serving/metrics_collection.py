"""Collects the metrics of all replicas of the deployments."""

import asyncio
from collections.abc import Mapping

from ray.serve.handle import DeploymentHandle

from deployments.observability import metrics
from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metrics import MetricsRecorder
from deployments.serving.calls import NO_REQUEST, run_in_fresh_context

SCRAPE_TIMEOUT_S = 1.0  # Prometheus times out after ten times that, and would then get no metrics at all


async def collect_replica_metrics(
    handles: Mapping[str, DeploymentHandle], recorder: MetricsRecorder
) -> list[ReplicaMetrics]:
    """Returns the metrics of the replicas that respond in time.

    The other replicas are counted.
    """
    results = await asyncio.gather(*(_collect_from_deployment(handle) for handle in handles.values()))
    for name, (_, missing) in zip(handles, results, strict=True):
        recorder.add(metrics.UNREACHED_REPLICAS, missing, part=name)
    return [metrics_of_replica for collected, _ in results for metrics_of_replica in collected]


async def _collect_from_deployment(handle: DeploymentHandle) -> tuple[list[ReplicaMetrics], int]:
    """Returns the metrics and the number of replicas that did not respond."""
    try:
        async with asyncio.timeout(SCRAPE_TIMEOUT_S):
            broadcast = run_in_fresh_context(NO_REQUEST, handle.broadcast, "collect_metrics")
            # Ray Serve's public methods wait either for all replicas or for none.
            replicas = await broadcast._fetch_replica_results_async()
    except Exception:  # there are no replicas, or Serve does not know of any at the moment
        return [], 1
    if not replicas:
        return [], 1
    tasks = [asyncio.ensure_future(replica.get_async()) for replica in replicas]
    try:
        await asyncio.wait(tasks, timeout=SCRAPE_TIMEOUT_S)
        collected = [
            task.result() for task in tasks if task.done() and not task.cancelled() and task.exception() is None
        ]
    finally:  # even if the scrape itself is cancelled
        for task in tasks:
            task.cancel()
    return collected, len(tasks) - len(collected)
