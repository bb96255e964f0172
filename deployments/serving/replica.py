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
from parse.engines.native.engine import Load
from parse.engines.native.service import ModelService
from parse.prompts import Check
from parse.types import MethodChoice, Sampling

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
        self.service = ModelService(settings)
        self._steps, self._progressed = 0, time.monotonic()
        self._meters = Meters(metrics.OF_ENGINES, deployment=type(self).__name__)
        self._telling: asyncio.Task[None] | None = None

    async def warm_up(self) -> None:
        """What is done only once, before anybody waits for it: kernels compiled, memory touched."""
        size = min(64, self.service.max_context // 4)
        prompt = [token % self.service.model.vocabulary for token in range(size)]
        check = Check(suffix=(0,), correct=(0,), incorrect=(1,))
        await self.service.judge(prompt, prompt, range(8, size + 1, 8), check, logprobs=0)
        greedy = Sampling(temperature=0.0, max_tokens=size, ignore_eos=True)
        choices: tuple[MethodChoice, ...] = (*self.service.methods, "none")
        for choice in choices:
            async for _ in self.service.generate(prompt, sampling=greedy, speculation=choice):
                pass
        self.service.forget()
        self.service.unlearn()
        self._telling = asyncio.create_task(self._keep_telling())

    def check_health(self) -> None:
        """Raises where only a new replica helps; Ray Serve asks, and replaces this one."""
        if not self.service.engine.alive:
            raise RuntimeError("the engine has died")
        load, now = self.service.load, time.monotonic()
        if load.steps != self._steps or not load.running:
            self._steps, self._progressed = load.steps, now
        elif now - self._progressed > STUCK_S:
            raise RuntimeError(f"the engine has made no step for {STUCK_S:g} s")

    async def alive(self) -> None:
        self.check_health()

    async def load(self) -> Load:
        return self.service.load

    async def figures(self) -> Figures:
        self._measure()
        return self._meters.figures()

    async def _keep_telling(self) -> None:
        while True:
            self._measure()
            logs.flush()
            await asyncio.sleep(TELL_EVERY_S)

    def _measure(self) -> None:
        load, meters = self.service.load, self._meters
        meters.set(metrics.ENGINE_RUNNING, load.running)
        meters.set(metrics.ENGINE_WAITING, load.waiting)
        meters.set(metrics.ENGINE_PAGES, load.pages_used - load.pages_idle, state="used")
        meters.set(metrics.ENGINE_PAGES, load.pages_idle, state="idle")
        meters.set(metrics.ENGINE_PAGES, load.pages - load.pages_used, state="free")
        meters.reach(metrics.ENGINE_STEPS, load.steps)
        meters.reach(metrics.ENGINE_BATCHED, load.step_calls)
        meters.reach(metrics.ENGINE_TOKENS, load.tokens)
        meters.reach(metrics.ENGINE_BUSY, load.busy_s)
        meters.reach(metrics.ENGINE_LOOKED, load.prefix_tokens)
        meters.reach(metrics.ENGINE_FOUND, load.prefix_hits)
        meters.reach(metrics.ENGINE_EVICTIONS, load.evictions)

    async def describe(self) -> Description:
        model = self.service.model
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Description(model.name, str(model.device), visible, self.service.max_context, os.getpid())


def hide_gpus_not_given() -> None:
    """A replica that asked for no GPU would see them all."""
    if not (ray.is_initialized() and ray.get_gpu_ids()):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
