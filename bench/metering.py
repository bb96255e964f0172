"""What it costs that the service tells of itself: the same requests with all metrics, and with none.

    python -m bench.metering --requests 60 --concurrency 8 --rounds 6

Both servers run over the same models in this process and take turns. Metrics go both ways out, to Ray's pipeline as
well. Beside the throughput, which moves with whatever else the machine does, it is measured how long the requests
spent writing figures down: that is the cost itself.
"""

import argparse
import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import ray
import uvicorn

from bench.client import Asking, ask, connected
from bench.latency import Load, Run
from bench.load import Contender, closed_loop, in_turns
from bench.questions import demo_tasks
from deployments.api.backend import Session
from deployments.api.routes import create_app
from deployments.config import ApiSettings
from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metrics import ROUTER_METRICS, Counter, Gauge, Histogram, MetricsRecorder
from parse.config import EngineSettings
from parse.local import DEMO_DRAFT, DEMO_TARGET, LocalPair
from parse.pipeline import Pipeline

WARMUP = 4


class Telling(MetricsRecorder):
    """On both ways, as in a replica; and it looks at the clock."""

    def __init__(self) -> None:
        super().__init__(ROUTER_METRICS, deployment="Router")
        self._ray_metrics = {metric.name: metric.create_in_ray() for metric in ROUTER_METRICS}
        self.spent_s, self.written = 0.0, 0

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spent_s += time.perf_counter() - started
        self.written += 1

    def add(self, metric: Counter, amount: float = 1, **labels: str) -> None:
        with self._timed():
            super().add(metric, amount, **labels)

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        with self._timed():
            super().set(metric, value, **labels)

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        with self._timed():
            super().observe(metric, value, **labels)


class Silent(MetricsRecorder):
    def __init__(self) -> None:
        super().__init__(ROUTER_METRICS, deployment="Router")

    def add(self, metric: Counter, amount: float = 1, **labels: str) -> None:
        pass

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        pass

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        pass


@dataclass
class Here:
    """`deployments.api.backend.Backend` in this process."""

    pipeline: Pipeline
    recorder: MetricsRecorder

    def pipeline_for_session(self, _: Session) -> Pipeline:
        return self.pipeline

    def unavailable_parts(self) -> dict[str, str]:
        return {}

    def update_metrics(self) -> None:
        pass

    async def collect_peer_metrics(self) -> list[ReplicaMetrics]:
        return []


@contextmanager
def served(backend: Here) -> Iterator[str]:
    """Its address."""
    app = create_app(backend, ApiSettings(), "demo-target")
    with socket.create_server(("127.0.0.1", 0)) as port:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{port.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


async def against(addresses: Mapping[str, str], args: argparse.Namespace) -> list[Run]:
    asking = Asking("demo-target", mode=args.mode)
    count = WARMUP + args.requests
    async with connected(addresses["telling"], None) as one, connected(addresses["silent"], None) as other:
        field = {
            name: Contender(partial(ask, client, asking), demo_tasks(count, args.seed, cast))
            for cast, (name, client) in enumerate((("silent", other), ("telling", one)))
        }
        for contender in field.values():
            await closed_loop(contender.ask, contender.tasks[:WARMUP], 1)
        load = Load(clients=args.concurrency)
        return await in_turns(field, load, range(WARMUP, count), args.rounds, args.seed)


def main(given: Sequence[str] | None = None) -> None:
    args = _arguments(given)
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init("local", num_cpus=1, **quiet)
    target, draft = (EngineSettings(model=model, threads=1, memory_mb=512) for model in (DEMO_TARGET, DEMO_DRAFT))
    telling = Telling()
    with ExitStack() as stack:
        pair = stack.enter_context(LocalPair(target, draft))
        meters = {"telling": telling, "silent": Silent()}
        addresses = {name: stack.enter_context(served(Here(pair.pipeline, each))) for name, each in meters.items()}
        runs = asyncio.run(against(addresses, args))
    silent, told = runs
    rates = [[len(found.outcomes) / found.wall_s for found in run.rounds] for run in (silent, told)]
    pairs = [with_metrics / without for without, with_metrics in zip(*rates, strict=True)]
    seconds = sum(found.wall_s for found in told.rounds)
    print(f"requests/s, medians: {median(rates[0]):.2f} silent, {median(rates[1]):.2f} telling")
    print(f"telling over silent, round by round: {', '.join(f'{ratio:.3f}' for ratio in pairs)}; {median(pairs):.3f}")
    asked = args.requests + WARMUP
    each = telling.spent_s / telling.written
    print(
        f"{telling.written / asked:.0f} figures a request, {each * 1e6:.1f} us each with the look at the clock: "
        f"{telling.spent_s / asked * 1e3:.2f} ms a request, {telling.spent_s / seconds:.2%} of the time"
    )
    ray.shutdown()


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.metering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=60, help="of each (default: 60)")
    parser.add_argument("--concurrency", type=int, default=8, help="clients at a time (default: 8)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each (default: 6)")
    parser.add_argument("--mode", default="full")
    parser.add_argument("--seed", type=int, default=5)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
