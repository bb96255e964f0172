"""The base class of the replicas that run a model.

It assigns the device, warms up the engine, and reports health and metrics.
"""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families

from deployments.observability import logs, metrics
from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metrics import EXPORT_INTERVAL_S, MetricsRecorder
from deployments.serving.deployment_lookup import wait_for_deployment
from parse.config import EngineSettings
from parse.engines.loader import load_engine
from parse.engines.protocol import EngineStats


@dataclass(frozen=True)
class ReplicaInfo:
    """The model of a replica and its device."""

    model: str
    device: str
    visible_gpus: str  # CUDA_VISIBLE_DEVICES
    max_model_len: int
    pid: int


@dataclass(frozen=True)
class RunningEngine:
    """The settings of an engine, and what Ray has given to its replica."""

    settings: EngineSettings
    runtime_env: Mapping[str, Any]
    resources: Mapping[str, float]


class ModelReplica:
    """A replica with an engine. Drafters and verifiers are such replicas."""

    def __init__(self, settings: EngineSettings) -> None:
        logs.attach_to_serve_logger()
        hide_unassigned_gpus()
        self._settings = settings
        self.engine = load_engine(settings, wait_for_deployment)
        self._recorder = MetricsRecorder(metrics.ENGINE_METRICS, deployment=type(self).__name__)
        self._export_task: asyncio.Task[None] | None = None

    async def warm_up(self) -> None:
        await self.engine.warm_up()
        self._export_task = asyncio.create_task(self._export_metrics_loop())

    def check_health(self) -> None:
        """Raises if the engine cannot recover.

        Ray Serve calls this and then replaces the replica.
        """
        self.engine.check_health()

    async def alive(self) -> None:
        """Raises if the engine cannot serve requests at the moment. Routers call this and report the reason."""
        await self.engine.check_available()

    async def running_engine(self) -> RunningEngine:
        context = ray.get_runtime_context()
        return RunningEngine(self._settings, dict(context.runtime_env), context.get_assigned_resources())

    async def stats(self) -> EngineStats:
        return await self.engine.read_stats()

    async def collect_metrics(self) -> ReplicaMetrics:
        stats = await self._update_metrics()
        collected = self._recorder.collect()
        server_families = text_string_to_metric_families(stats.server_metrics)
        return replace(collected, families=[*collected.families, *server_families])

    async def _export_metrics_loop(self) -> None:
        while True:
            await self._update_metrics()
            logs.flush_serve_logger()
            await asyncio.sleep(EXPORT_INTERVAL_S)

    async def _update_metrics(self) -> EngineStats:
        stats, recorder = await self.engine.read_stats(), self._recorder
        recorder.set(metrics.ENGINE_REQUESTS_RUNNING, stats.num_running)
        recorder.set(metrics.ENGINE_REQUESTS_WAITING, stats.num_waiting)
        recorder.set(metrics.ENGINE_KV_CACHE_BLOCKS, stats.blocks_used - stats.blocks_cached, state="used")
        recorder.set(metrics.ENGINE_KV_CACHE_BLOCKS, stats.blocks_cached, state="idle")
        recorder.set(metrics.ENGINE_KV_CACHE_BLOCKS, stats.blocks_total - stats.blocks_used, state="free")
        recorder.set(metrics.ENGINE_SERVERS, stats.servers_responding, state="responding")
        recorder.set(metrics.ENGINE_SERVERS, stats.servers_failing, state="failing")
        recorder.update_total(metrics.ENGINE_SERVER_RESTARTS, stats.num_server_restarts)
        recorder.update_total(metrics.ENGINE_PROPOSED_TOKENS, stats.num_proposed_tokens)
        recorder.update_total(metrics.ENGINE_ACCEPTED_TOKENS, stats.num_accepted_tokens)
        recorder.update_total(metrics.ENGINE_STEPS, stats.num_steps)
        recorder.update_total(metrics.ENGINE_TOKENS, stats.num_tokens)
        recorder.update_total(metrics.ENGINE_PREFIX_CACHE_QUERIES, stats.prefix_queries)
        recorder.update_total(metrics.ENGINE_PREFIX_CACHE_HITS, stats.prefix_hits)
        for metric, value in (
            (metrics.ENGINE_STEP_REQUESTS, stats.num_step_requests),
            (metrics.ENGINE_BUSY_SECONDS, stats.busy_s),
            (metrics.ENGINE_EVICTIONS, stats.evictions),
        ):
            if value is not None:
                recorder.update_total(metric, value)
        return stats

    async def describe(self) -> ReplicaInfo:
        engine, visible_gpus = self.engine, os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return ReplicaInfo(engine.name, engine.device, visible_gpus, engine.capabilities().max_model_len, os.getpid())


def hide_unassigned_gpus() -> None:
    """Hides the GPUs from a replica that has none assigned.

    Ray would leave all of them visible to it.
    """
    if not (ray.is_initialized() and ray.get_gpu_ids()):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
