"""Load against a server of ours: so many clients at a time, or requests that come whatever the server does.

    python -m bench.load --url http://127.0.0.1:8000 --requests 100 --concurrency 1,8 --json -
    python -m bench.load --url http://127.0.0.1:8000 --requests 100 --rate 4 --mode rounds
    python -m bench.load --url http://127.0.0.1:8000 --requests 200 --concurrency 8 --compare off,full,rounds

With --concurrency (closed loop) every client asks again when it was answered. With --rate (open loop) requests arrive
as a Poisson process, and latency counts from the scheduled arrival. Several numbers, or both options, are measured one
after the other, each on questions of its own. Modes that are compared take turns, round by round, on the same problems;
who begins changes from round to round.

What a server has computed it keeps: the same question again, and a draft of the same words, cost it less. So each mode
meets the demo's problems with other names in them, and a second run wants another --seed. A file's prompts are asked as
they are: there `cached_share`, the part of the prompts that the server knew already, says how far to trust a ratio.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from bench.client import Ask, Asking, Outcome, Unreachable, ask, connected, first_model
from bench.comparison import compared, plot, table
from bench.latency import Load, Round, Run
from bench.questions import BadPrompts, Task, demo_tasks, prompt_tasks

DEFAULT = "default"  # stands for the mode of a request that names none
ROUNDS = 4
Number = TypeVar("Number", int, float)


async def closed_loop(ask: Ask, tasks: Sequence[Task], clients: int) -> list[Outcome]:
    """So many clients, each of which asks again when it was answered."""
    waiting, outcomes = iter(tasks), list[Outcome]()

    async def client() -> None:
        for task in waiting:
            outcomes.append(await ask(task, time.perf_counter()))

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes


async def open_loop(ask: Ask, tasks: Sequence[Task], arrivals: Sequence[float]) -> list[Outcome]:
    """Every task at its time, however many are still unanswered; also what is asked late counts from its time."""
    started = time.perf_counter()

    async def at(arrival: float, task: Task) -> Outcome:
        await asyncio.sleep(started + arrival - time.perf_counter())
        return await ask(task, started + arrival)

    return await asyncio.gather(*map(at, arrivals, tasks))


def poisson(rate: float, count: int, seed: str) -> list[float]:
    """When they arrive, in seconds from the start; the same seed gives the same times.

    A Poisson process of which it is known that so many came in the time they should take: that they came at any moment
    alike. So the rate is kept exactly, however few they are.
    """
    drawn = random.Random(seed)
    return sorted(drawn.uniform(0, count / rate) for _ in range(count))


async def one_round(load: Load, ask: Ask, tasks: Sequence[Task], seed: str) -> Round:
    started, cpu_s = time.perf_counter(), time.process_time()
    if load.rate is not None:
        outcomes = await open_loop(ask, tasks, poisson(load.rate, len(tasks), seed))
    else:
        outcomes = await closed_loop(ask, tasks, load.clients or 1)
    return Round(outcomes, time.perf_counter() - started, time.process_time() - cpu_s)


@dataclass(frozen=True)
class Contender:
    """A mode to ask in, and what is asked."""

    ask: Ask
    tasks: Sequence[Task]


async def in_turns(field: Mapping[str, Contender], load: Load, span: range, rounds: int, seed: int) -> list[Run]:
    """All of them under the load, each on that span of its tasks."""
    names = list(field)
    found: dict[str, list[Round]] = {name: [] for name in names}
    for turn in range(rounds):
        part = span[len(span) * turn // rounds : len(span) * (turn + 1) // rounds]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            contender = field[name]
            tasks = contender.tasks[part.start : part.stop]
            found[name].append(await one_round(load, contender.ask, tasks, f"{seed}/{turn}"))
    return [Run(name, load, found[name]) for name in names]


async def against(args: argparse.Namespace, tasks: Mapping[str, Sequence[Task]]) -> tuple[str, list[Run]]:
    """The model that was asked, and what came of the tasks of each mode; the first of them are for warming up."""
    runs: list[Run] = []
    async with connected(args.url, args.api_key) as client:
        listed = await first_model(client)
        asking = Asking(args.model or listed, args.max_tokens, args.temperature, args.stream, timeout_s=args.timeout)
        with tqdm(total=sum(map(len, tasks.values())), desc="requests", unit="request", file=sys.stderr) as bar:
            field = {
                mode: Contender(_counted(partial(ask, client, replace(asking, mode=_named(mode))), bar), given)
                for mode, given in tasks.items()
            }
            for contender in field.values():
                await closed_loop(contender.ask, contender.tasks[: args.warmup], 1)
            for place, load in enumerate(args.loads):
                start = args.warmup + place * args.requests
                runs += await in_turns(field, load, range(start, start + args.requests), args.rounds, args.seed)
    return asking.model, runs


def _named(mode: str) -> str | None:
    return None if mode == DEFAULT else mode


def _counted(ask: Ask, bar: tqdm) -> Ask:
    async def counted(task: Task, due: float) -> Outcome:
        outcome = await ask(task, due)
        bar.update()
        return outcome

    return counted


def complaints(runs: Sequence[Run]) -> list[str]:
    """One of each kind of error, in the server's words."""
    words = {o.error: o.detail for run in reversed(runs) for o in reversed(run.outcomes) if o.error}
    return [f"{kind}: {detail or 'no more was said'}" for kind, detail in words.items()]


def _tasks(args: argparse.Namespace) -> dict[str, list[Task]]:
    count = args.warmup + len(args.loads) * args.requests
    if args.prompts:
        return dict.fromkeys(args.modes, prompt_tasks(args.prompts, count))
    return {mode: demo_tasks(count, args.seed, cast) for cast, mode in enumerate(args.modes)}


def main() -> None:
    args = _arguments()
    try:
        model, runs = asyncio.run(against(args, _tasks(args)))
    except (BadPrompts, Unreachable) as trouble:
        sys.exit(f"load: {trouble}")
    asked = {name: getattr(args, name) for name in ("url", "seed", "max_tokens", "temperature", "stream", "warmup")}
    result = {**asked, "model": model, "prompts": str(args.prompts or "demo"), **compared(runs)}
    if args.plot:
        plot(runs, result, args.plot)
    if args.json == "-":
        print(json.dumps(result, indent=2))
    else:
        print(table(result))
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    for line in complaints(runs):
        print(f"load: {line}", file=sys.stderr)
    if not any(outcome.reply for run in runs for outcome in run.outcomes):
        sys.exit("load: no request was answered")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="the server's address, with or without /v1")
    parser.add_argument("--requests", type=_at_least(1), default=100, metavar="N", help="of each mode under each load")
    parser.add_argument("--concurrency", type=_several(int), default=[], metavar="C", help="clients; or several: 1,8")
    parser.add_argument("--rate", type=_several(float), default=[], metavar="R", help="arrivals a second, or several")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--mode", help="as the server knows it; by default the request names none")
    mode.add_argument("--compare", type=_names, metavar="M1,M2", help="modes in turn; ratios are to the first")
    parser.add_argument("--rounds", type=_at_least(1), help=f"turns of each mode; {ROUNDS} if modes are compared, or 1")
    parser.add_argument("--prompts", type=Path, help='a file of {"prompt" or "messages": ..., "answer": what is said}')
    parser.add_argument("--seed", type=int, default=5, help="of the demo's problems, and of the arrivals")
    parser.add_argument("--max-tokens", type=_at_least(1), default=Asking.max_tokens)
    parser.add_argument("--temperature", type=float, default=Asking.temperature)
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model", help="by default the first that the server lists")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="by default OPENAI_API_KEY's value")
    parser.add_argument("--timeout", type=float, default=Asking.timeout_s, help="seconds for one request, all in all")
    parser.add_argument("--warmup", type=_at_least(0), default=2, help="requests in each mode that do not count")
    parser.add_argument("--json", metavar="PATH", help="where the figures go; - for standard output")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw latencies and rates, as .svg or .png")
    args = parser.parse_args()
    clients = args.concurrency or ([] if args.rate else [1])
    args.loads = [*(Load(clients=count) for count in clients), *(Load(rate=rate) for rate in args.rate)]
    args.modes = args.compare or [args.mode or DEFAULT]
    args.rounds = args.rounds or (ROUNDS if args.compare else 1)
    if args.rounds > args.requests:
        parser.error("--rounds: more than there are requests")
    for path in (args.json, args.plot):  # before the work is done, not after it
        if path and not Path(path).parent.is_dir():
            parser.error(f"there is no folder {Path(path).parent}")
    return args


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


def _several(kind: type[Number]) -> Callable[[str], list[Number]]:
    def numbers(text: str) -> list[Number]:
        values = [kind(part) for part in text.split(",")]
        if not all(0 < value < 1e6 for value in values) or len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"must be different positive numbers, got {text}")
        return values

    return numbers


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be different modes, got {text}")
    return names


if __name__ == "__main__":
    main()
