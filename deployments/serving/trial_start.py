"""Starts a changed vLLM once before it is deployed, while the earlier version keeps serving.

vLLM can accept its arguments and still fail later, for example when it allocates its KV cache. Ray Serve stops replicas
of the earlier version before it starts new ones, so after such a failure nothing would serve.
"""

import asyncio
import logging
from typing import Any

import ray
from ray import serve
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.serving.replica import hide_unassigned_gpus
from parse.config import EngineSettings
from parse.engine_config import VLLMEngineConfig
from parse.engines.loader import load_engine
from parse.pair_settings import model_load_error

logger = logging.getLogger(__name__)

NUM_CPUS = 0.1  # as little as possible, because the earlier version still has its own
PLACEMENT_TIMEOUT_S = 5.0
REPLICA_TIMEOUT_S = 10.0
NO_RESOURCES = "%s: no resources are left to try the new vLLM while the old one serves"


def check_start(argument: str, deployment: str, settings: EngineSettings, num_gpus: float) -> None:
    """Raises ModelLoadError, in vLLM's words, if vLLM does not start with new settings.

    It is not tried if no earlier version serves, if that one already runs with the same settings, or if the cluster has
    no resources left for a second vLLM.
    """
    if not isinstance(settings.engine, VLLMEngineConfig) or settings.engine.reserves_gpus:
        return
    running = asyncio.run(_running_settings(deployment))
    if running is None or running == settings:
        return
    num_gpus = num_gpus if "GPU" in ray.cluster_resources() else 0  # vLLM's build for CPUs needs none
    resources = {"CPU": NUM_CPUS} | ({"GPU": num_gpus} if num_gpus else {})
    available = ray.available_resources()  # an autoscaler would start a node for a placement group that has to wait
    if any(available.get(name, 0) < amount for name, amount in resources.items()):
        logger.warning(NO_RESOURCES, argument)
        return
    group = placement_group([resources])
    try:
        if not group.wait(PLACEMENT_TIMEOUT_S):  # they are not on one node
            logger.warning(NO_RESOURCES, argument)
            return
        options: dict[str, Any] = {"num_cpus": NUM_CPUS, "num_gpus": num_gpus, "max_retries": 0}
        strategy = PlacementGroupSchedulingStrategy(group)
        message = ray.get(ray.remote(_start).options(scheduling_strategy=strategy, **options).remote(settings))
    finally:
        remove_placement_group(group)
    if message is not None:
        raise model_load_error(argument, settings.model, ValueError(message))


def _start(settings: EngineSettings) -> str | None:
    """Starts an engine and stops it again. Returns the message if it does not start."""
    hide_unassigned_gpus()
    try:
        load_engine(settings).shutdown()
    except ValueError as error:
        return str(error)
    return None


async def _running_settings(deployment: str) -> EngineSettings | None:
    """Returns the settings of a replica that runs now, or None if none responds.

    While Ray Serve builds a new version, it does not say which deployments an application has, so all are asked.
    """
    for application in serve.status().applications:
        try:
            handle = serve.get_deployment_handle(deployment, application)
            async with asyncio.timeout(REPLICA_TIMEOUT_S):
                settings: EngineSettings = await handle.engine_settings.remote()
                return settings
        except Exception as error:  # there is none, it is being replaced, or it belongs to another kind of application
            logger.info("no %s of the application %s responds: %s", deployment, application, error)
    return None
