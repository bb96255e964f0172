"""A client of a deployed service, which can also call its replicas directly."""

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
from parse.engines.protocol import EngineStats
from training import measure
from training.task import Problem

MODEL = "demo-target"
TIMEOUT_S = 180.0  # long, because these tests do not measure speed


def problems(count: int, seed: int = 3) -> list[Problem]:
    return measure.draw_problems(seed, count, split="service")


def free_port(outside: Container[int] = ()) -> int:
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        if port not in outside:
            return port


def chat(prompt: str, *, mode: str = "full", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "parse": {"mode": mode}} | more


@dataclass(frozen=True)
class ServiceClient:
    url: str

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, limits=limits) as client:
            yield client

    async def ask(self, body: dict[str, Any]) -> httpx.Response:
        async with self.client() as client:
            return await client.post("/v1/chat/completions", json=body)

    async def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        response = await self.ask(body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def stats(self, name: str) -> list[EngineStats]:
        """Returns the statistics of all replicas of a deployment."""
        return list(await replicas(name).broadcast("stats").results_async())

    async def describe(self, name: str) -> list[ReplicaInfo]:
        return list(await replicas(name).broadcast("describe").results_async())

    async def wait_until_idle(self) -> None:
        """Returns when no engine runs a request or holds blocks for one."""

        async def is_idle() -> bool:
            all_stats = [stats for name in ("Verifier", "Drafter") for stats in await self.stats(name)]
            return bool(all_stats) and all(
                not stats.num_running and not stats.num_waiting and stats.blocks_used == stats.blocks_cached
                for stats in all_stats
            )

        await until(is_idle)
        await until(is_idle)  # twice, because for a moment a call is neither in the queue nor in the engine


def replicas(name: str, application: str = "parse") -> DeploymentHandle:
    """Returns a handle to a deployment that outlives the event loop of a test."""
    handle = serve.get_deployment_handle(name, application)
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    return handle


async def until(condition: Callable[[], Awaitable[bool]], *, interval_s: float = 0.2) -> None:
    last: Exception | None = None
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        try:
            if await condition():
                return
        except Exception as error:  # a replica may be down for a moment
            last = error
        await asyncio.sleep(interval_s)
    raise AssertionError(f"the condition never held: {last!r}")


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
