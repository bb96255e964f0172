"""What the tests ask of a deployed service, and how they look behind it."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.serving.replica import ReplicaInfo
from parse.engines.native.engine_core import EngineStats
from training import measure
from training.task import Problem

MODEL = "demo-target"
LONG_ENOUGH_S = 90.0  # for whatever is waited for; nothing is said about how fast it comes


def problems(count: int, seed: int = 3) -> list[Problem]:
    return measure.draw_problems(seed, count, split="service")


def free_port(outside: Container[int] = ()) -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in outside:
            return port


def chat(question: str, *, mode: str = "full", **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": turns, "temperature": 0, "parse": {"mode": mode}} | more


@dataclass(frozen=True)
class Service:
    url: str

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=LONG_ENOUGH_S, limits=limits) as client:
            yield client

    async def ask(self, body: dict[str, Any]) -> httpx.Response:
        async with self.client() as client:
            return await client.post("/v1/chat/completions", json=body)

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        response = await self.ask(body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def loads(self, name: str) -> list[EngineStats]:
        """Of all replicas."""
        return list(await replicas(name).broadcast("load").results_async())

    async def describe(self, name: str) -> list[ReplicaInfo]:
        return list(await replicas(name).broadcast("describe").results_async())

    async def comes_to_rest(self) -> None:
        """Nobody is at work any more, and holds no memory."""

        async def resting() -> bool:
            loads = [load for name in ("Verifier", "Drafter") for load in await self.loads(name)]
            return bool(loads) and all(
                not load.num_running and not load.num_waiting and load.blocks_used == load.blocks_cached
                for load in loads
            )

        await until(resting)
        await until(resting)  # seen twice: between queue and engine a call is nowhere for a moment


def replicas(name: str) -> DeploymentHandle:
    """Of one deployment; the handle outlives the event loop of any test."""
    handle = serve.get_deployment_handle(name, "parse")
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return handle


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    last: Exception | None = None
    end = time.monotonic() + LONG_ENOUGH_S
    while time.monotonic() < end:
        try:
            if await holds():
                return
        except Exception as error:  # what is asked may be dead for a moment
            last = error
        await asyncio.sleep(0.2)
    raise AssertionError(f"it never came: {last!r}")


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
