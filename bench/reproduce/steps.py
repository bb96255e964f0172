"""The measurements of each server: commands that each write one JSON file."""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.reproduce.plan import ReproducePlan, ServerPlan

MIN_REQUESTS = 4  # of a contender with any number of clients
MAX_ROUNDS = 4
REQUESTS_PER_CLIENT = 2  # of a round, so that few clients idle at its end
MAX_PILOT_CLIENTS = 8
MAX_SLOWNESS = 4.0  # a contender that takes this many times the planned time answers fewer requests
PILOT_S = 30.0
QUALITY_CLIENTS = 8
QUALITY_LEFT_OUT = frozenset(("exact",))  # it keeps the text of mode off, apart from rounding
FIRST_SEED = 100
PILOT_SEED = 99
DISPLAYED_PYTHON = "python"


@dataclass(frozen=True)
class BenchmarkStep:
    """A command that measures a server and writes one JSON file."""

    id: str
    server: str
    kind: Literal["pilot", "load", "quality"]
    arguments: tuple[str, ...]
    """The arguments of Python, without the address of the server and the JSON file."""
    clients: int | None = None

    def command(self, url: str, json_file: Path) -> list[str]:
        return [sys.executable, *self.arguments, "--url", url, "--json", str(json_file)]

    def shell_command(self, url: str, json_file: Path) -> str:
        return shlex.join([DISPLAYED_PYTHON, *self.command(url, json_file)[1:]])


@dataclass(frozen=True)
class RequestCount:
    """The number of requests of each contender with one number of clients, and the rounds that divide them."""

    requests: int
    rounds: int
    max_round_s: float
    """After this time, no further request of a round is sent. It limits the time of slow contenders."""


def num_cells(plan: ReproducePlan) -> int:
    """Returns the number of pairs of a contender and a number of clients."""
    return len(plan.clients) * sum(len(server.modes) or 1 for server in plan.servers)


def pilot_steps(plan: ReproducePlan) -> list[BenchmarkStep]:
    """Returns short measurements of the target alone, which say how many requests fit into the time."""
    levels = [clients for clients in plan.clients if clients <= MAX_PILOT_CLIENTS] or [min(plan.clients)]
    server = plan.servers[0]
    return [
        BenchmarkStep(
            f"pilot-{clients}",
            server.name,
            "pilot",
            _load_arguments(
                plan, server, clients, RequestCount(max(3, REQUESTS_PER_CLIENT * clients), 1, PILOT_S), PILOT_SEED
            ),
            clients,
        )
        for clients in levels
    ]


def choose_counts(
    clients: Sequence[int], pilot_rates: Mapping[int, float], seconds_per_cell: float
) -> dict[int, RequestCount]:
    """Returns how many requests each contender gets with each number of clients.

    All contenders get the same number, so that they answer the same problems. It is what the target alone answers in
    the time, at the rate that the pilot measured with at most this number of clients, but at least one per client.
    """
    counts = {}
    for number in clients:
        measured = [level for level in pilot_rates if level <= number]
        rate = pilot_rates[max(measured)] if measured else 0.0
        requests = max(MIN_REQUESTS, number, math.ceil(rate * seconds_per_cell))
        rounds = max(1, min(MAX_ROUNDS, requests // (REQUESTS_PER_CLIENT * number)))
        max_round_s = MAX_SLOWNESS * seconds_per_cell / rounds
        counts[number] = RequestCount(math.ceil(requests / rounds) * rounds, rounds, round(max_round_s, 1))
    return counts


def pilot_rate(document: Mapping[str, Any]) -> float:
    (run,) = document["runs"]
    return float(run["requests_per_s"])


def measurement_steps(
    plan: ReproducePlan, server: ServerPlan, counts: Mapping[int, RequestCount]
) -> list[BenchmarkStep]:
    """Returns the load measurements of a server, and of PARSE also that of the quality.

    The quality is measured without vLLM's own speculation, which does not change the answers of a mode. The accuracy
    under load is measured with it too.
    """
    steps = [
        BenchmarkStep(
            f"load-{server.name}-{clients}",
            server.name,
            "load",
            _load_arguments(plan, server, clients, counts[clients], FIRST_SEED + index),
            clients,
        )
        for index, clients in enumerate(plan.clients)
    ]
    if server.modes and server.speculation is None:
        steps.append(BenchmarkStep(f"quality-{server.name}", server.name, "quality", _quality_arguments(plan, server)))
    return steps


def all_steps(plan: ReproducePlan, counts: Mapping[int, RequestCount]) -> list[BenchmarkStep]:
    return [
        *pilot_steps(plan),
        *(step for server in plan.servers for step in measurement_steps(plan, server, counts)),
    ]


def _load_arguments(
    plan: ReproducePlan, server: ServerPlan, clients: int, count: RequestCount, seed: int
) -> tuple[str, ...]:
    """Returns the arguments of a load measurement.

    The seed differs between numbers of clients, so that no prompt is cached by an earlier measurement. It is the same
    for all servers.
    """
    tasks = plan.tasks
    arguments = [
        *("-m", "bench.load", "--requests", str(count.requests), "--concurrency", str(clients)),
        *("--rounds", str(count.rounds), "--max-round-s", str(count.max_round_s)),
        *("--seed", str(seed), "--max-tokens", str(tasks.max_tokens)),
    ]
    if server.modes:
        arguments += ["--compare", ",".join(server.modes)]
    if tasks.prompts is not None:
        arguments += ["--prompts", str(tasks.prompts), "--distinct-prompts"]
        arguments += ["--result", tasks.result] if tasks.result else []
    return tuple(arguments)


def _quality_arguments(plan: ReproducePlan, server: ServerPlan) -> tuple[str, ...]:
    tasks = plan.tasks
    modes = [mode for mode in server.modes if mode not in QUALITY_LEFT_OUT]
    return (
        *("-m", "bench.quality", "--tasks", ",".join(tasks.quality), "--modes", ",".join(modes)),
        *("--limit", str(tasks.limit), "--concurrency", str(QUALITY_CLIENTS)),
        *(("--max-tokens", str(tasks.quality_max_tokens)) if tasks.quality_max_tokens else ()),
        *(("--result", tasks.result) if tasks.result else ()),
    )
