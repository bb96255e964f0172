"""Measures a server under load: a number of clients at a time, or requests that arrive at a fixed rate.

    python -m bench.load --url http://127.0.0.1:8000 --requests 100 --concurrency 1,8 --json -
    python -m bench.load --url http://127.0.0.1:8000 --requests 100 --rate 4 --mode rounds
    python -m bench.load --url http://127.0.0.1:8000 --requests 200 --concurrency 8 --compare off+none,off,full,auto

A contender is a mode, such as `off`, which uses the server's default token-level method, or a mode with a method, such
as `off+none` or `full+eagle3`. Contenders that are compared take turns, round by round, on the same problems. The order
changes from round to round. Ratios are to the first contender.

With --concurrency (closed loop) every client sends its next request when it has an answer. With --rate (open loop)
requests arrive as a Poisson process, and latency counts from the scheduled arrival. Several numbers, or both options,
are measured one after the other, each on problems of its own.

A server caches prompts, so a repeated prompt costs less. Each contender therefore gets the problems of the demo task
with different names of people, and a second run needs another --seed. Prompts of a file are sent unchanged, unless
--distinct-prompts puts a number into each of them, which differs between contenders and seeds. With unchanged prompts
`cached_share`, the part of the prompts that was cached, shows how far you can trust a ratio. All contenders share the
state of the server, such as what mode `auto` learned about drafting.
"""

import argparse
import asyncio
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from bench.client import (
    RequestParams,
    RequestResult,
    SendRequest,
    ServedModel,
    ServerUnreachable,
    get_first_model,
    open_client,
    send_request,
)
from bench.comparison import compare_runs, plot, table
from bench.latency import BenchmarkRun, OfferedLoad, Round
from bench.output import add_json_argument, write_output
from bench.workload import InvalidPromptFile, SampleRequest, demo_requests, load_requests, number_prompts
from training.provenance import describe_run

DEFAULT = "default"  # the name of requests without a mode
ROUNDS = 4
Number = TypeVar("Number", int, float)


async def closed_loop(
    send: SendRequest, requests: Sequence[SampleRequest], clients: int, max_s: float = math.inf
) -> list[RequestResult]:
    """Runs a number of clients, each of which sends its next request when it has an answer.

    No request is sent after `max_s` seconds, except the first one of each client.
    """
    pending, results = iter(requests), list[RequestResult]()
    deadline = time.perf_counter() + max_s

    async def client() -> None:
        for request in pending:
            results.append(await send(request, time.perf_counter()))
            if time.perf_counter() > deadline:
                return

    await asyncio.gather(*(client() for _ in range(clients)))
    return results


async def open_loop(
    send: SendRequest, requests: Sequence[SampleRequest], arrivals: Sequence[float]
) -> list[RequestResult]:
    """Sends every request at its time, however many are unanswered. Latency counts from that time."""
    started = time.perf_counter()

    async def send_at(arrival: float, request: SampleRequest) -> RequestResult:
        await asyncio.sleep(started + arrival - time.perf_counter())
        return await send(request, started + arrival)

    return await asyncio.gather(*map(send_at, arrivals, requests))


def poisson_arrivals(rate: float, count: int, seed: str) -> list[float]:
    """Returns arrival times in seconds from the start. The same seed gives the same times.

    They are those of a Poisson process under the condition that `count` arrivals fall into their expected time. So the
    mean rate is exact even for a few arrivals.
    """
    rng = random.Random(seed)
    return sorted(rng.uniform(0, count / rate) for _ in range(count))


async def run_round(
    load: OfferedLoad, send: SendRequest, requests: Sequence[SampleRequest], seed: str, max_s: float = math.inf
) -> Round:
    started, cpu_s = time.perf_counter(), time.process_time()
    if load.rate is not None:
        results = await open_loop(send, requests, poisson_arrivals(load.rate, len(requests), seed))
    else:
        results = await closed_loop(send, requests, load.clients or 1, max_s)
    return Round(results, time.perf_counter() - started, time.process_time() - cpu_s)


@dataclass(frozen=True)
class Workload:
    """The requests of one contender, and the function that sends them."""

    send: SendRequest
    requests: Sequence[SampleRequest]


async def run_interleaved(
    workloads: Mapping[str, Workload],
    load: OfferedLoad,
    problem_range: range,
    rounds: int,
    seed: int,
    max_round_s: float = math.inf,
) -> list[BenchmarkRun]:
    """Runs all workloads under the load, each on the same range of its requests, in rotating order."""
    names = list(workloads)
    rounds_by_name: dict[str, list[Round]] = {name: [] for name in names}
    for round_index in range(rounds):
        part = problem_range[
            len(problem_range) * round_index // rounds : len(problem_range) * (round_index + 1) // rounds
        ]
        for name in names[round_index % len(names) :] + names[: round_index % len(names)]:
            workload = workloads[name]
            requests = workload.requests[part.start : part.stop]
            rounds_by_name[name].append(
                await run_round(load, workload.send, requests, f"{seed}/{round_index}", max_round_s)
            )
    return [BenchmarkRun(name, load, rounds_by_name[name]) for name in names]


def with_contender(params: RequestParams, contender: str) -> RequestParams:
    """Returns the parameters of a contender's requests."""
    mode, _, method = contender.partition("+")
    return replace(params, mode=None if mode == DEFAULT else mode, method=method or None)


async def run_load(
    args: argparse.Namespace, requests_by_mode: Mapping[str, Sequence[SampleRequest]]
) -> tuple[ServedModel, list[BenchmarkRun]]:
    """Returns the served model and the runs of each contender. The first requests only warm up the server."""
    runs: list[BenchmarkRun] = []
    async with open_client(args.url, args.api_key) as client:
        served = await get_first_model(client)
        params = RequestParams(
            args.model or served.name, args.max_tokens, args.temperature, args.stream, timeout_s=args.timeout
        )
        with tqdm(
            total=sum(map(len, requests_by_mode.values())), desc="requests", unit="request", file=sys.stderr
        ) as bar:
            workloads = {
                mode: Workload(
                    _with_progress(partial(send_request, client, with_contender(params, mode)), bar),
                    requests,
                )
                for mode, requests in requests_by_mode.items()
            }
            for workload in workloads.values():
                await closed_loop(workload.send, workload.requests[: args.warmup], 1)
            for load_index, load in enumerate(args.loads):
                start = args.warmup + load_index * args.requests
                runs += await run_interleaved(
                    workloads, load, range(start, start + args.requests), args.rounds, args.seed, args.max_round_s
                )
    return replace(served, name=params.model), runs


def _with_progress(send: SendRequest, bar: tqdm) -> SendRequest:
    async def send_and_count(request: SampleRequest, scheduled_at: float) -> RequestResult:
        result = await send(request, scheduled_at)
        bar.update()
        return result

    return send_and_count


def error_messages(runs: Sequence[BenchmarkRun]) -> list[str]:
    """Returns one message for each kind of error, as the server wrote it."""
    details = {o.error: o.detail for run in reversed(runs) for o in reversed(run.results) if o.error}
    return [f"{kind}: {detail or 'no message'}" for kind, detail in details.items()]


def _build_requests(args: argparse.Namespace) -> dict[str, list[SampleRequest]]:
    count = args.warmup + len(args.loads) * args.requests
    if args.prompts:
        requests = load_requests(args.prompts, count, args.result)
        if not args.distinct_prompts:
            return dict.fromkeys(args.modes, requests)
        return {
            mode: number_prompts(requests, f"{args.seed}-{contender}") for contender, mode in enumerate(args.modes, 1)
        }
    return {mode: demo_requests(count, args.seed, name_set) for name_set, mode in enumerate(args.modes)}


def main() -> None:
    args = _arguments()
    description = describe_run(problems=args.requests, seeds=[args.seed])
    try:
        served, runs = asyncio.run(run_load(args, _build_requests(args)))
    except (InvalidPromptFile, ServerUnreachable) as trouble:
        sys.exit(f"load: {trouble}")
    settings = {name: getattr(args, name) for name in ("url", "seed", "max_tokens", "temperature", "stream", "warmup")}
    result = {
        "run": description,
        **settings,
        "model": served.name,
        "served": served.choices,
        "prompts": str(args.prompts or "demo"),
        **compare_runs(runs),
    }
    if args.plot:
        plot(runs, result, args.plot)
    write_output(result, table(result), args.json)
    for line in error_messages(runs):
        print(f"load: {line}", file=sys.stderr)
    if not any(request_result.response for run in runs for request_result in run.results):
        sys.exit("load: no request was answered")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="address of the server, with or without /v1")
    parser.add_argument(
        "--requests", type=_at_least(1), default=100, metavar="N", help="of each contender under each load"
    )
    parser.add_argument(
        "--concurrency",
        type=_distinct_numbers(int),
        default=[],
        metavar="C",
        help="number of clients, or several: 1,8",
    )
    parser.add_argument(
        "--rate", type=_distinct_numbers(float), default=[], metavar="R", help="arrivals per second, or several numbers"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--mode", help="mode, or mode+method (default: requests choose no mode)")
    mode.add_argument(
        "--compare", type=_names, metavar="M1,M2", help="contenders that take turns; ratios are to the first"
    )
    parser.add_argument(
        "--rounds", type=_at_least(1), help=f"turns of each contender (default: {ROUNDS} with --compare)"
    )
    parser.add_argument(
        "--max-round-s",
        type=float,
        default=math.inf,
        metavar="S",
        help="with --concurrency, no further request of a contender's round is sent after this time",
    )
    parser.add_argument(
        "--prompts", type=Path, help='file with lines of {"prompt" or "messages": ..., "answer": expected text}'
    )
    parser.add_argument(
        "--result",
        metavar="REGEX",
        help="finds the result in an answer to a prompt of a file: its last match, or the first group of that match, "
        "must be `answer`. Without it, `answer` must occur in the text",
    )
    parser.add_argument(
        "--distinct-prompts",
        action="store_true",
        help="put a number into each prompt of a file, so that no contender uses what is cached from another one",
    )
    parser.add_argument("--seed", type=int, default=5, help="seed of the demo problems and of the arrivals")
    parser.add_argument("--max-tokens", type=_at_least(1), default=RequestParams.max_tokens)
    parser.add_argument("--temperature", type=float, default=RequestParams.temperature)
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model", help="default: the first model that the server lists")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: value of OPENAI_API_KEY")
    parser.add_argument("--timeout", type=float, default=RequestParams.timeout_s, help="seconds for one request")
    parser.add_argument("--warmup", type=_at_least(0), default=2, help="requests of each contender that do not count")
    add_json_argument(parser)
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw latencies and rates, as .svg or .png")
    args = parser.parse_args()
    clients = args.concurrency or ([] if args.rate else [1])
    args.loads = [*(OfferedLoad(clients=count) for count in clients), *(OfferedLoad(rate=rate) for rate in args.rate)]
    args.modes = args.compare or [args.mode or DEFAULT]
    args.rounds = args.rounds or (ROUNDS if args.compare else 1)
    if args.rounds > args.requests:
        parser.error("--rounds: more than there are requests")
    try:
        re.compile(args.result or "")
    except re.error as error:
        parser.error(f"--result: {error}")
    if (args.result or args.distinct_prompts) and not args.prompts:
        parser.error("--result and --distinct-prompts need --prompts")
    for path in (args.json, args.plot):  # reported before the measurement, not after it
        if path and not Path(path).parent.is_dir():
            parser.error(f"there is no folder {Path(path).parent}")
    return args


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return number


def _distinct_numbers(kind: type[Number]) -> Callable[[str], list[Number]]:
    def numbers(text: str) -> list[Number]:
        values = [kind(part) for part in text.split(",")]
        if not all(0 < value < 1e6 for value in values) or len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"must be different positive numbers, got {text}")
        return values

    return numbers


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be different contenders, got {text}")
    return names


if __name__ == "__main__":
    main()
