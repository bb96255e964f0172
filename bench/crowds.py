"""Several answers at once on one engine: what is left of a method's speed-up when passes are full anyway.

What a method makes of a load it has to learn first; so each begins with answers that are not counted. Methods take
turns with plain writing, in an order that changes, and all answer the same questions.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from tqdm import tqdm

from bench.contenders import Answer, Ours, forget
from bench.passes import Curve, Seen, Watch, bare
from bench.prediction import Writing, by_depth, writing
from parse.local import LocalPair
from parse.types import MethodChoice, MethodName, sum_stats

CLIENTS = 1, 4, 16
ROUNDS = 3
WAVES = 3  # answers of each client
FEWEST = 16  # answers counted, however few clients


@dataclass(frozen=True)
class Block:
    """Some answers of one method, one after another for each client."""

    answers: tuple[Answer, ...]
    seconds: float
    seen: Seen

    @property
    def tokens_per_s(self) -> float:
        return sum(len(a.ids) for a in self.answers) / self.seconds


async def run(
    pair: LocalPair, watch: Watch, prompts: Sequence[Sequence[int]], alone: Mapping[MethodName, Writing]
) -> list[dict[str, Any]]:
    choices: list[MethodChoice] = ["none", *pair.target.methods]
    places = [(turn, clients) for turn in range(ROUNDS) for clients in CLIENTS]
    blocks: dict[int, dict[MethodChoice, list[Block]]] = {c: {choice: [] for choice in choices} for c in CLIENTS}
    curves: dict[int, list[Curve]] = {clients: [] for clients in CLIENTS}
    for turn, clients in tqdm(places, desc="crowds", unit="crowd", file=sys.stderr):
        for choice in choices[turn:] + choices[:turn]:
            curves[clients].append(bare(pair.target.model, clients))
            blocks[clients][choice].append(await block(Ours(pair, "off", choice), watch, prompts, clients))
    return [
        figures(clients, method, blocks[clients], Curve.median(curves[clients]), alone.get(method))
        for clients in CLIENTS
        for method in pair.target.methods
    ]


async def block(ours: Ours, watch: Watch, prompts: Sequence[Sequence[int]], clients: int) -> Block:
    count = max(FEWEST, WAVES * clients)
    forget(ours.pair)
    await _answered(ours, _cycle(prompts, max(FEWEST // 4, clients)), clients)
    forget(ours.pair)
    watch.taken()
    began = time.perf_counter()
    answers = await _answered(ours, _cycle(prompts, count), clients)
    return Block(tuple(answers), time.perf_counter() - began, watch.taken())


async def _answered(ours: Ours, prompts: Iterator[Sequence[int]], clients: int) -> list[Answer]:
    answers: list[Answer] = []

    async def client() -> None:
        for prompt in prompts:  # all clients take from one row
            answers.append(await ours.answer(prompt))  # noqa: PERF401

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def _cycle(prompts: Sequence[Sequence[int]], count: int) -> Iterator[Sequence[int]]:
    return (prompts[turn % len(prompts)] for turn in range(count))


def figures(
    clients: int,
    method: MethodName,
    blocks: Mapping[MethodChoice, Sequence[Block]],
    curve: Curve,
    alone: Writing | None,
) -> dict[str, Any]:
    plain, ours = blocks["none"], blocks[method]
    came = sum_stats(a.speculated for b in ours for a in b.answers)
    assert came is not None
    found = writing(came, reduce(Seen.__add__, (b.seen for b in ours)))
    depths = by_depth(alone, curve, method, found.step_s(method)) if alone and method != "space" else []
    best = max(range(len(depths)), key=depths.__getitem__, default=None)
    return {
        "clients": clients,
        "method": method,
        "tokens_per_s": statistics.median(b.tokens_per_s for b in ours),
        "plain_tokens_per_s": statistics.median(b.tokens_per_s for b in plain),
        "ratios": [b.tokens_per_s / p.tokens_per_s for b, p in zip(ours, plain, strict=True)],
        "tokens_per_pass": found.tokens_per_pass,
        "depth": sum(found.proposed) / found.passes,
        **asdict(found),
        "bare": asdict(curve),
        "by_depth": depths,
        "best_depth": None if best is None else best + 1,
    }


def table(crowds: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| clients | method | tokens/s | plain | speed-up | rounds | tokens a pass | proposed a pass | entries a pass "
        "| best depth by the model | speed-up there | at full depth |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in crowds:
        model = ["", "", ""]
        if one["by_depth"]:
            model = [str(one["best_depth"]), f"{max(one['by_depth']):.2f}", f"{one['by_depth'][-1]:.2f}"]
        ratios = one["ratios"]
        lines.append(
            f"| {one['clients']} | {one['method']} | {one['tokens_per_s']:.0f} | {one['plain_tokens_per_s']:.0f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {one['tokens_per_pass']:.2f} | {one['depth']:.1f} | {one['entries']:.1f} | {' | '.join(model)} |"
        )
    return "\n".join(lines)
