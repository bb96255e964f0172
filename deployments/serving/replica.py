"""A model in a replica of its own: on the devices it was given, warmed up, and watched."""

import asyncio
import os
import time
from dataclasses import dataclass

import ray

from deployments.observability import logs, metrics
from deployments.observability.exposition import Figures
from deployments.observability.metrics import TELL_EVERY_S, Meters
from parse.config import EngineSettings
from parse.engines.native.engine import EngineStats
from parse.engines.native.service import NativeEngine
from parse.prompts import VerificationSuffix
from parse.types import MethodChoice, SamplingParams

STUCK_S = 30.0  # a step takes no longer than that


@dataclass(frozen=True)
class Description:
    """What a replica serves, and on what."""

    model: str
    device: str
    visible_gpus: str  # as CUDA_VISIBLE_DEVICES says it
    max_context: int
    pid: int


class Host:
    """What drafters and verifiers have in common."""

    def __init__(self, settings: EngineSettings) -> None:
        logs.join_serve()
        hide_gpus_not_given()
        self.service = NativeEngine(settings)
        self._steps, self._progressed = 0, time.monotonic()
        self._meters = Meters(metrics.OF_ENGINES, deployment=type(self).__name__)
        self._telling: asyncio.Task[None] | None = None

    async def warm_up(self) -> None:
        """What is done only once, before anybody waits for it: kernels compiled, memory touched."""
        size = min(64, self.service.max_model_len // 4)
        prompt = [token % self.service.model.vocab_size for token in range(size)]
        check = VerificationSuffix(token_ids=(0,), correct_token_ids=(0,), incorrect_token_ids=(1,))
        await self.service.judge(prompt, prompt, range(8, size + 1, 8), check, logprobs=0)
        greedy = SamplingParams(temperature=0.0, max_tokens=size, ignore_eos=True)
        choices: tuple[MethodChoice, ...] = (*self.service.methods, "none")
        for choice in choices:
            async for _ in self.service.generate(prompt, sampling=greedy, speculation=choice):
                pass
        self.service.reset_prefix_cache()
        self.service.reset_acceptance_history()
        self._telling = asyncio.create_task(self._keep_telling())

    def check_health(self) -> None:
        """Raises where only a new replica helps; Ray Serve asks, and replaces this one."""
        if not self.service.core.alive:
            raise RuntimeError("the engine has died")
        load, now = self.service.stats, time.monotonic()
        if load.num_steps != self._steps or not load.num_running:
            self._steps, self._progressed = load.num_steps, now
        elif now - self._progressed > STUCK_S:
            raise RuntimeError(f"the engine has made no step for {STUCK_S:g} s")

    async def alive(self) -> None:
        self.check_health()

    async def load(self) -> EngineStats:
        return self.service.stats

    async def figures(self) -> Figures:
        self._measure()
        return self._meters.figures()

    async def _keep_telling(self) -> None:
        while True:
            self._measure()
            logs.flush()
            await asyncio.sleep(TELL_EVERY_S)

    def _measure(self) -> None:
        load, meters = self.service.stats, self._meters
        meters.set(metrics.ENGINE_RUNNING, load.num_running)
        meters.set(metrics.ENGINE_WAITING, load.num_waiting)
        meters.set(metrics.ENGINE_PAGES, load.blocks_used - load.blocks_cached, state="used")
        meters.set(metrics.ENGINE_PAGES, load.blocks_cached, state="idle")
        meters.set(metrics.ENGINE_PAGES, load.blocks_total - load.blocks_used, state="free")
        meters.reach(metrics.ENGINE_STEPS, load.num_steps)
        meters.reach(metrics.ENGINE_BATCHED, load.num_step_requests)
        meters.reach(metrics.ENGINE_TOKENS, load.num_tokens)
        meters.reach(metrics.ENGINE_BUSY, load.busy_s)
        meters.reach(metrics.ENGINE_LOOKED, load.prefix_queries)
        meters.reach(metrics.ENGINE_FOUND, load.prefix_hits)
        meters.reach(metrics.ENGINE_EVICTIONS, load.evictions)

    async def describe(self) -> Description:
        model = self.service.model
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Description(model.name, str(model.device), visible, self.service.max_model_len, os.getpid())


def hide_gpus_not_given() -> None:
    """A replica that asked for no GPU would see them all."""
    if not (ray.is_initialized() and ray.get_gpu_ids()):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
