"""A model in a replica of its own: on the devices it was given, warmed up, and watched."""

import asyncio
import os
import time
from dataclasses import dataclass

import ray

from deployments.observability import logs, metrics
from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metrics import EXPORT_INTERVAL_S, MetricsRecorder
from parse.config import EngineSettings
from parse.engines.native.engine import EngineStats
from parse.engines.native.service import NativeEngine
from parse.prompts import VerificationSuffix
from parse.types import SamplingParams

MAX_STEP_DURATION_S = 30.0  # a step takes no longer than that


@dataclass(frozen=True)
class ReplicaInfo:
    """What a replica serves, and on what."""

    model: str
    device: str
    visible_gpus: str  # as CUDA_VISIBLE_DEVICES says it
    max_model_len: int
    pid: int


class ModelReplica:
    """What drafters and verifiers have in common."""

    def __init__(self, settings: EngineSettings) -> None:
        logs.attach_to_serve_logger()
        hide_unassigned_gpus()
        self.engine = NativeEngine(settings)
        self._last_step_count, self._last_progress_at = 0, time.monotonic()
        self._recorder = MetricsRecorder(metrics.ENGINE_METRICS, deployment=type(self).__name__)
        self._export_task: asyncio.Task[None] | None = None

    async def warm_up(self) -> None:
        """What is done only once, before anybody waits for it: kernels compiled, memory touched."""
        num_tokens = min(64, self.engine.max_model_len // 4)
        prompt = [token % self.engine.model.vocab_size for token in range(num_tokens)]
        suffix = VerificationSuffix(token_ids=(0,), correct_token_ids=(0,), incorrect_token_ids=(1,))
        await self.engine.judge(prompt, prompt, range(8, num_tokens + 1, 8), suffix, logprobs=0)
        greedy = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for method in (*self.engine.methods, "none"):
            async for _ in self.engine.generate(prompt, sampling=greedy, speculation=method):
                pass
        self.engine.reset_prefix_cache()
        self.engine.reset_acceptance_history()
        self._export_task = asyncio.create_task(self._export_metrics_loop())

    def check_health(self) -> None:
        """Raises where only a new replica helps; Ray Serve asks, and replaces this one."""
        if not self.engine.core.alive:
            raise RuntimeError("the engine has died")
        load, now = self.engine.stats, time.monotonic()
        if load.num_steps != self._last_step_count or not load.num_running:
            self._last_step_count, self._last_progress_at = load.num_steps, now
        elif now - self._last_progress_at > MAX_STEP_DURATION_S:
            raise RuntimeError(f"the engine has made no step for {MAX_STEP_DURATION_S:g} s")

    async def alive(self) -> None:
        self.check_health()

    async def load(self) -> EngineStats:
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
        load, recorder = self.engine.stats, self._recorder
        recorder.set(metrics.ENGINE_REQUESTS_RUNNING, load.num_running)
        recorder.set(metrics.ENGINE_REQUESTS_WAITING, load.num_waiting)
        recorder.set(metrics.ENGINE_KV_CACHE_BLOCKS, load.blocks_used - load.blocks_cached, state="used")
        recorder.set(metrics.ENGINE_KV_CACHE_BLOCKS, load.blocks_cached, state="idle")
        recorder.set(metrics.ENGINE_KV_CACHE_BLOCKS, load.blocks_total - load.blocks_used, state="free")
        recorder.update_total(metrics.ENGINE_STEPS, load.num_steps)
        recorder.update_total(metrics.ENGINE_STEP_REQUESTS, load.num_step_requests)
        recorder.update_total(metrics.ENGINE_TOKENS, load.num_tokens)
        recorder.update_total(metrics.ENGINE_BUSY_SECONDS, load.busy_s)
        recorder.update_total(metrics.ENGINE_PREFIX_CACHE_QUERIES, load.prefix_queries)
        recorder.update_total(metrics.ENGINE_PREFIX_CACHE_HITS, load.prefix_hits)
        recorder.update_total(metrics.ENGINE_EVICTIONS, load.evictions)

    async def describe(self) -> ReplicaInfo:
        model = self.engine.model
        visible_gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return ReplicaInfo(model.name, str(model.device), visible_gpus, self.engine.max_model_len, os.getpid())


def hide_unassigned_gpus() -> None:
    """A replica that asked for no GPU would see them all."""
    if not (ray.is_initialized() and ray.get_gpu_ids()):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
