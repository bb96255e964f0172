"""Measures the cost of metrics: the same requests with all metrics and with none.

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

from bench.client import RequestParams, open_client, send_request
from bench.latency import BenchmarkRun, OfferedLoad
from bench.load import Workload, closed_loop, run_interleaved
from bench.workload import demo_requests
from deployments.api.routes import create_app
from deployments.config import ApiSettings
from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metrics import ROUTER_METRICS, Counter, Gauge, Histogram, MetricsRecorder
from deployments.session import Session
from parse.config import EngineSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.pair import Pair
from parse.pipeline import Pipeline

WARMUP = 4


class TimedRecorder(MetricsRecorder):
    """Records metrics to both exporters, as in a replica, and measures the time."""

    def __init__(self) -> None:
        super().__init__(ROUTER_METRICS, deployment="Router")
        self._ray_metrics = {metric.name: metric.create_in_ray() for metric in ROUTER_METRICS}
        self.spent_s, self.updates = 0.0, 0

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spent_s += time.perf_counter() - started
        self.updates += 1

    def add(self, metric: Counter, amount: float = 1, **labels: str) -> None:
        with self._timed():
            super().add(metric, amount, **labels)

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        with self._timed():
            super().set(metric, value, **labels)

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        with self._timed():
            super().observe(metric, value, **labels)


class NullRecorder(MetricsRecorder):
    def __init__(self) -> None:
        super().__init__(ROUTER_METRICS, deployment="Router")

    def add(self, metric: Counter, amount: float = 1, **labels: str) -> None:
        pass

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        pass

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        pass


@dataclass
class InProcessBackend:
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
def serve(backend: InProcessBackend) -> Iterator[str]:
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


async def run_both(addresses: Mapping[str, str], args: argparse.Namespace) -> list[BenchmarkRun]:
    params = RequestParams("demo-target", mode=args.mode)
    count = WARMUP + args.requests
    async with open_client(addresses["telling"], None) as metered, open_client(addresses["silent"], None) as unmetered:
        workloads = {
            name: Workload(partial(send_request, client, params), demo_requests(count, args.seed, name_set))
            for name_set, (name, client) in enumerate((("silent", unmetered), ("telling", metered)))
        }
        for workload in workloads.values():
            await closed_loop(workload.send, workload.requests[:WARMUP], 1)
        load = OfferedLoad(clients=args.concurrency)
        return await run_interleaved(workloads, load, range(WARMUP, count), args.rounds, args.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init("local", num_cpus=1, **quiet)
    target, draft = (
        EngineSettings(model=model, num_threads=1, kv_cache_memory_bytes=512 * 2**20)
        for model in (DEMO_TARGET, DEMO_DRAFT)
    )
    timed = TimedRecorder()
    with ExitStack() as stack:
        pair = stack.enter_context(Pair(target, draft))
        meters = {"telling": timed, "silent": NullRecorder()}
        addresses = {
            name: stack.enter_context(serve(InProcessBackend(pair.pipeline, recorder)))
            for name, recorder in meters.items()
        }
        runs = asyncio.run(run_both(addresses, args))
    unmetered, metered = runs
    rates = [[len(measured.results) / measured.wall_s for measured in run.rounds] for run in (unmetered, metered)]
    ratios = [with_metrics / without for without, with_metrics in zip(*rates, strict=True)]
    seconds = sum(measured.wall_s for measured in metered.rounds)
    print(f"requests/s, medians: {median(rates[0]):.2f} silent, {median(rates[1]):.2f} telling")
    print(f"telling over silent, round by round: {', '.join(f'{ratio:.3f}' for ratio in ratios)}; {median(ratios):.3f}")
    requests = args.requests + WARMUP
    update_s = timed.spent_s / timed.updates
    print(
        f"{timed.updates / requests:.0f} figures a request, {update_s * 1e6:.1f} us each with the look at the clock: "
        f"{timed.spent_s / requests * 1e3:.2f} ms a request, {timed.spent_s / seconds:.2%} of the time"
    )
    ray.shutdown()


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.metering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=60, help="of each (default: 60)")
    parser.add_argument("--concurrency", type=int, default=8, help="clients at a time (default: 8)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each (default: 6)")
    parser.add_argument("--mode", default="full")
    parser.add_argument("--seed", type=int, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
