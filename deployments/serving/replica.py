"""The base class of the replicas that run a model.

It assigns the device, warms up the engine, and reports health and metrics.
"""

import asyncio
import os
import time
from dataclasses import dataclass

import ray

from deployments.observability import logs, metrics
from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metrics import EXPORT_INTERVAL_S, MetricsRecorder
from parse.config import EngineSettings
from parse.engines.loader import load_native_engine
from parse.engines.native.engine_core import EngineStats
from parse.prompts import VerificationSuffix
from parse.requests import GenerateRequest, VerifyRequest
from parse.types import SamplingParams

MAX_STEP_DURATION_S = 30.0  # an engine that needs longer for a step is considered hung


@dataclass(frozen=True)
class ReplicaInfo:
    """The model of a replica and its device."""

    model: str
    device: str
    visible_gpus: str  # CUDA_VISIBLE_DEVICES
    max_model_len: int
    pid: int


class ModelReplica:
    """A replica with an engine. Drafters and verifiers are such replicas."""

    def __init__(self, settings: EngineSettings) -> None:
        logs.attach_to_serve_logger()
        hide_unassigned_gpus()
        self.engine = load_native_engine(settings)
        self._last_step_count, self._last_progress_at = 0, time.monotonic()
        self._recorder = MetricsRecorder(metrics.ENGINE_METRICS, deployment=type(self).__name__)
        self._export_task: asyncio.Task[None] | None = None

    async def warm_up(self) -> None:
        """Runs every kind of request once.

        Kernels are then compiled and memory is allocated before clients wait.
        """
        num_tokens = min(64, self.engine.max_model_len // 4)
        prompt = [token % self.engine.model.vocab_size for token in range(num_tokens)]
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
        verify = VerifyRequest(
            prompt_token_ids=prompt,
            draft_token_ids=prompt,
            prefix_lengths=range(8, num_tokens + 1, 8),
            suffix=VerificationSuffix(token_ids=(0,), correct_token_ids=(0,), incorrect_token_ids=(1,)),
            policy=None,
            num_logprobs=0,
        )
        await self.engine.verify(verify)
        for method in (*self.engine.methods, "none"):
            generate = GenerateRequest(prompt_token_ids=prompt, sampling_params=params, speculative_method=method)
            async for _ in self.engine.generate(generate):
                pass
        self.engine.reset_prefix_cache()
        self.engine.reset_acceptance_history()
        self._export_task = asyncio.create_task(self._export_metrics_loop())

    def check_health(self) -> None:
        """Raises if the engine cannot recover.

        Ray Serve calls this and then replaces the replica.
        """
        if not self.engine.core.alive:
            raise RuntimeError("the engine's thread has ended")
        stats, now = self.engine.stats, time.monotonic()
        if stats.num_steps != self._last_step_count or not stats.num_running:
            self._last_step_count, self._last_progress_at = stats.num_steps, now
        elif now - self._last_progress_at > MAX_STEP_DURATION_S:
            raise RuntimeError(f"the engine hangs: it has made no step for {MAX_STEP_DURATION_S:g} s")

    async def alive(self) -> None:
        self.check_health()

    async def stats(self) -> EngineStats:
        return self.engine.stats

    async def collect_metrics(self) -> ReplicaMetrics:
        self._update_metrics()
        return self._recorder.collect()

    async def _export_metrics_loop(self) -> None:
        while True:
            self._update_metrics()
            logs.flush_serve_logger()
            await asyncio.sleep(EXPORT_INTERVAL_S)

    def _update_metrics(self) -> None:
        stats, recorder = self.engine.stats, self._recorder
        recorder.set(metrics.ENGINE_REQUESTS_RUNNING, stats.num_running)
        recorder.set(metrics.ENGINE_REQUESTS_WAITING, stats.num_waiting)
        recorder.set(metrics.ENGINE_KV_CACHE_BLOCKS, stats.blocks_used - stats.blocks_cached, state="used")
        recorder.set(metrics.ENGINE_KV_CACHE_BLOCKS, stats.blocks_cached, state="idle")
        recorder.set(metrics.ENGINE_KV_CACHE_BLOCKS, stats.blocks_total - stats.blocks_used, state="free")
        recorder.update_total(metrics.ENGINE_STEPS, stats.num_steps)
        recorder.update_total(metrics.ENGINE_STEP_REQUESTS, stats.num_step_requests)
        recorder.update_total(metrics.ENGINE_TOKENS, stats.num_tokens)
        recorder.update_total(metrics.ENGINE_BUSY_SECONDS, stats.busy_s)
        recorder.update_total(metrics.ENGINE_PREFIX_CACHE_QUERIES, stats.prefix_queries)
        recorder.update_total(metrics.ENGINE_PREFIX_CACHE_HITS, stats.prefix_hits)
        recorder.update_total(metrics.ENGINE_EVICTIONS, stats.evictions)

    async def describe(self) -> ReplicaInfo:
        model = self.engine.model
        visible_gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return ReplicaInfo(model.name, str(model.device), visible_gpus, self.engine.max_model_len, os.getpid())


def hide_unassigned_gpus() -> None:
    """Hides the GPUs from a replica that has none assigned.

    Ray would leave all of them visible to it.
    """
    if not (ray.is_initialized() and ray.get_gpu_ids()):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
