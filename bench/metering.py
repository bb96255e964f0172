"""Measures the cost of metrics: the same requests with all metrics and with none.

    python -m bench.metering --requests 100 --mode full,off --rounds 6 --json metering.json

Both servers run over the same models in this process and take turns. One of them records all metrics for both
exporters, that of Ray included. The throughput varies with the load of the machine, so the program also measures the
time that requests spend on recording metrics, which is the cost itself.
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
from statistics import geometric_mean, median
from typing import Any

import ray
import uvicorn

from bench.client import RequestParams, open_client, send_request
from bench.latency import BenchmarkRun, OfferedLoad
from bench.load import Workload, closed_loop, run_interleaved
from bench.output import add_json_argument, heading, row, write_output
from bench.workload import demo_requests
from deployments.api.routes import create_app
from deployments.config import ApiSettings
from deployments.observability.exposition import ReplicaMetrics
from deployments.observability.metric_types import Counter, Gauge, Histogram
from deployments.observability.metrics import ROUTER_METRICS, MetricsRecorder
from deployments.session import Session
from parse.config import EngineSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.pair import Pair
from parse.pipeline import Pipeline
from training.confidence import format_ratio, rounds_interval
from training.provenance import describe_run

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

    async def deployment_failure(self) -> str | None:
        return None

    def update_metrics(self) -> None:
        pass

    async def collect_peer_metrics(self) -> list[ReplicaMetrics]:
        return []


@contextmanager
def serve(backend: InProcessBackend) -> Iterator[str]:
    """Serves the backend on a free port, and yields the address."""
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


async def run_both(addresses: Mapping[str, str], mode: str, args: argparse.Namespace) -> list[BenchmarkRun]:
    params = RequestParams("demo-target", mode=mode)
    count = WARMUP + args.requests
    metered_url, unmetered_url = addresses["with metrics"], addresses["without"]
    first_name_set = 2 * args.mode.split(",").index(mode)  # so that no mode finds the prompts of another one cached
    async with open_client(metered_url, None) as metered, open_client(unmetered_url, None) as unmetered:
        workloads = {
            name: Workload(
                partial(send_request, client, params), demo_requests(count, args.seed, first_name_set + name_set)
            )
            for name_set, (name, client) in enumerate((("without", unmetered), ("with metrics", metered)))
        }
        for workload in workloads.values():
            await closed_loop(workload.send, workload.requests[:WARMUP], 1)
        load = OfferedLoad(clients=args.concurrency)
        return await run_interleaved(workloads, load, range(WARMUP, count), args.rounds, args.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    description = describe_run(problems=args.requests, seeds=[args.seed])
    modes: dict[str, Any] = {}
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init("local", num_cpus=1, **quiet)
    target, draft = (
        EngineSettings(model=model, num_threads=1, kv_cache_memory_bytes=512 * 2**20)
        for model in (DEMO_TARGET, DEMO_DRAFT)
    )
    timed = TimedRecorder()
    with ExitStack() as stack:
        pair = stack.enter_context(Pair(target, draft))
        meters = {"with metrics": timed, "without": NullRecorder()}
        addresses = {
            name: stack.enter_context(serve(InProcessBackend(pair.pipeline, recorder)))
            for name, recorder in meters.items()
        }
        for mode in args.mode.split(","):
            timed.spent_s, timed.updates = 0.0, 0
            modes[mode] = summarize(asyncio.run(run_both(addresses, mode, args)), timed)
    ray.shutdown()
    result = {"run": description, "concurrency": args.concurrency, "rounds": args.rounds, "modes": modes}
    write_output(result, table(result), args.json)


def summarize(runs: Sequence[BenchmarkRun], timed: TimedRecorder) -> dict[str, Any]:
    unmetered, metered = runs
    rates = [[len(measured.results) / measured.wall_s for measured in run.rounds] for run in (unmetered, metered)]
    ratios = [with_metrics / without for without, with_metrics in zip(*rates, strict=True)]
    requests = WARMUP + len(metered.results)  # the recorder also counts the requests that warm up the server
    return {
        "requests": len(metered.results),
        "requests_per_s": {"without": median(rates[0]), "with_metrics": median(rates[1])},
        "ratios": ratios,
        "ratio": geometric_mean(ratios),
        "ratio_interval": rounds_interval(ratios),
        "updates_per_request": timed.updates / requests,
        "update_us": timed.spent_s / timed.updates * 1e6,
        "ms_per_request": timed.spent_s / requests * 1e3,
        "share_of_time": timed.spent_s / requests * len(metered.results) / sum(part.wall_s for part in metered.rounds),
    }


def table(result: Mapping[str, Any]) -> str:
    lines = heading("mode", "updates per request", "time for them", "share of the time", "requests/s with over without")
    for mode, figures in result["modes"].items():
        lines.append(
            row(
                mode,
                f"{figures['updates_per_request']:.0f}",
                f"{figures['ms_per_request']:.2f} ms",
                f"{figures['share_of_time']:.2%}",
                format_ratio(figures["ratio"], figures["ratio_interval"]),
            )
        )
    return "\n".join(lines)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.metering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=60, help="requests of each server and mode (default: 60)")
    parser.add_argument("--concurrency", type=int, default=8, help="clients (default: 8)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each server (default: 6)")
    parser.add_argument("--mode", default="full", metavar="M1,M2", help="modes, one after the other (default: full)")
    parser.add_argument("--seed", type=int, default=5, help="seed of the problems (default: 5)")
    add_json_argument(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
