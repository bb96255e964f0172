"""The figures of all replicas of a deployment, fetched from each."""

import asyncio
from collections.abc import Mapping

from ray.serve.handle import DeploymentHandle

from deployments.observability import metrics
from deployments.observability.exposition import Figures
from deployments.observability.metrics import Meters
from deployments.serving.calls import ALONE, apart

PATIENCE_S = 1.0  # Prometheus has as much as ten times that, and should hear of the others


async def gathered(handles: Mapping[str, DeploymentHandle], meters: Meters) -> list[Figures]:
    """Whoever does not answer in time is left out, and counted."""
    told = await asyncio.gather(*(_told(handle) for handle in handles.values()))
    for name, (_, missing) in zip(handles, told, strict=True):
        meters.add(metrics.UNREACHED, missing, part=name)
    return [figures for found, _ in told for figures in found]


async def _told(handle: DeploymentHandle) -> tuple[list[Figures], int]:
    """And how many are missing."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            broadcast = apart(ALONE, handle.broadcast, "figures")
            # What the class offers in public waits for all of them, or for none.
            replicas = await broadcast._fetch_replica_results_async()
    except Exception:  # there are none, or they are not known at the moment
        return [], 1
    if not replicas:
        return [], 1
    asked = [asyncio.ensure_future(replica.get_async()) for replica in replicas]
    try:
        await asyncio.wait(asked, timeout=PATIENCE_S)
        found = [one.result() for one in asked if one.done() and not one.cancelled() and one.exception() is None]
    finally:  # also where the scrape itself is given up
        for one in asked:
            one.cancel()
    return found, len(asked) - len(found)
