"""Starts a changed vLLM once before it is deployed, while the earlier version keeps serving.

vLLM can accept its arguments and still fail later, for example when it allocates its KV cache. Ray Serve stops replicas
of the earlier version before it starts new ones, so after such a failure nothing would serve.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.serving.replica import RunningEngine, hide_unassigned_gpus
from parse.config import EngineSettings
from parse.engine_config import VLLMEngineConfig
from parse.engines.loader import load_engine
from parse.pair_settings import model_load_error

logger = logging.getLogger(__name__)

NUM_CPUS = 0.1  # as little as possible, because the earlier version still has its own
PLACEMENT_TIMEOUT_S = 5.0
REPLICA_TIMEOUT_S = 30.0


def check_start(argument: str, deployment: str, settings: EngineSettings, num_gpus: float) -> None:
    """Raises ModelLoadError, in vLLM's words, if vLLM does not start with new settings.

    It is not tried if no earlier version serves, if that one already runs with the same settings, or if the cluster has
    no resources left for a second vLLM. It gets the environment and the resources of a replica that runs now, because
    those of the new deployment are not known while the application is built.
    """
    if not isinstance(settings.engine, VLLMEngineConfig) or settings.engine.reserves_gpus:
        return
    running = asyncio.run(_running_engines(deployment))
    if all(engine.settings == settings for engine in running):
        return
    engine = running[0]
    resources = {name: amount for name, amount in engine.resources.items() if name not in ("CPU", "GPU", "memory")}
    if num_gpus and (engine.resources.get("GPU") or not isinstance(engine.settings.engine, VLLMEngineConfig)):
        resources["GPU"] = num_gpus  # otherwise it is vLLM's build for CPUs
    try:
        message = _try_start(settings, {"CPU": NUM_CPUS} | resources, engine.runtime_env)
    except RayError as error:
        message = f"vLLM cannot be tried: {type(error).__name__}: {error}"
    except NoResources:
        logger.warning("%s: no resources are left to try the new vLLM while the old one serves", argument)
        return
    if message is not None:
        raise model_load_error(argument, settings.model, ValueError(message))


class NoResources(RuntimeError):
    """The cluster has too few free resources."""


def _try_start(settings: EngineSettings, resources: Mapping[str, float], runtime_env: Mapping[str, Any]) -> str | None:
    """Returns the message if the engine does not start with these resources."""
    available = ray.available_resources()  # an autoscaler would start a node for a placement group that has to wait
    if any(available.get(name, 0) < amount for name, amount in resources.items()):
        raise NoResources
    group = placement_group([dict(resources)])
    try:
        if not group.wait(PLACEMENT_TIMEOUT_S):  # they are not on one node
            raise NoResources
        others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        task = ray.remote(_start).options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            resources=others,
            runtime_env=dict(runtime_env),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
            max_retries=0,
        )
        message: str | None = ray.get(task.remote(settings))
        return message
    finally:
        remove_placement_group(group)


def _start(settings: EngineSettings) -> str | None:
    """Starts an engine and stops it again. Returns the message if it does not start."""
    hide_unassigned_gpus()
    try:
        load_engine(settings).shutdown()
    except Exception as error:
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return None


async def _running_engines(deployment: str) -> list[RunningEngine]:
    """Returns one engine of each application that has such a deployment and serves.

    While Ray Serve builds a new version, it does not say which deployments an application has, so all are asked.
    """
    engines = []
    for application in serve.status().applications:
        try:
            handle = serve.get_deployment_handle(deployment, application)
        except KeyError:  # there is no such deployment
            continue
        try:
            async with asyncio.timeout(REPLICA_TIMEOUT_S):
                engines.append(await handle.running_engine.remote())
        except Exception as error:
            logger.warning("no %s of %s responds, so new settings are not tried: %r", deployment, application, error)
    return engines
