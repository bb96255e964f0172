"""Several tokens in a pass, by every method, alone and within PARSE; what it should bring, and what is left of it when
many ask at once."""

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM

from bench import crowds
from bench.contenders import Answer, Answers, Contender, Ours, Peers, compete, tokens_per_s
from bench.passes import Curve, Seen, Watch, bare, prompt_s
from bench.prediction import Writing, needed, predicted, writing
from parse.config import EngineSettings, SpeculationSettings
from parse.controller import DraftingController
from parse.local import LocalPair
from parse.prompts import chat_prompt_token_ids
from parse.protocol import Mode
from parse.types import MethodChoice, MethodName, sum_stats
from training import measure
from training.rows import Writer
from training.task import Problem
from training.wording import TARGET

MODES: tuple[Mode, ...] = "off", "full", "rounds"
PLAIN, BARE = "off", "off, none loaded"
METHODS: tuple[MethodName, ...] = get_args(MethodName)


def methods(models: Path) -> tuple[SpeculationSettings, ...]:
    """All there are, chains, as deep as each was made for."""
    return (
        SpeculationSettings(method="parallel", head=str(models / "demo-parallel")),
        SpeculationSettings(method="eagle3", head=str(models / "demo-eagle3"), tokens=12),
        SpeculationSettings(method="space", head=str(models / "demo-space")),
        SpeculationSettings(method="draft_model", head=str(models / "demo-draft")),
        SpeculationSettings(method="ngram"),
    )


class Watched:
    """A contender, and the passes that its answers took."""

    def __init__(self, ours: Ours, watch: Watch) -> None:
        self.ours, self.watch = ours, watch
        self.seen = Seen()

    async def __call__(self, prompt: Sequence[int]) -> Answer:
        self.watch.taken()
        answer = await self.ours(prompt)
        self.seen += self.watch.taken()
        return answer


def by_itself(pair: LocalPair, mode: Mode, method: MethodChoice) -> Ours:
    """What it learns of drafting it learns from its own answers."""
    return Ours(pair, mode, method, pipeline=replace(pair.pipeline, control=DraftingController()))


def name_of(mode: Mode, method: MethodChoice) -> str:
    return mode if method == "none" else f"{mode} + {method}"


def run(count: int, seed: int, models: Path, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    problems = measure.problems(seed, count, split="bench")
    target, draft = (
        EngineSettings(model=str(models / name), threads=threads) for name in ("demo-target", "demo-draft")
    )
    with (
        LocalPair(target.model_copy(update={"speculation": methods(models)}), draft) as pair,
        LocalPair(target) as without,
    ):
        prompts = [chat_prompt_token_ids(pair.tokenizer, [{"role": "user", "content": p.question}]) for p in problems]
        watch = Watch(pair.target)
        choices: tuple[MethodChoice, ...] = "none", *pair.target.methods
        ours = {
            name_of(mode, method): Watched(by_itself(pair, mode, method), watch) for mode in MODES for method in choices
        }
        loaded = (AutoModelForCausalLM.from_pretrained(s.model).eval() for s in (target, draft))
        peers = Peers(pair, *loaded)
        field: dict[str, Contender] = {
            **ours,
            BARE: Ours(without, "off"),
            "hf_generate": peers.generate,
            "hf_assisted": peers.assisted,
        }
        model = pair.target.model
        curves: list[Curve] = []
        masked: list[Curve] = []
        reading: list[float] = []

        def meanwhile(turn: int) -> None:
            curves.append(bare(model, 1))
            masked.append(bare(model, 1, masked=True))
            reading.append(prompt_s(model, len(prompts[turn])))

        answers = asyncio.run(compete(field, prompts, meanwhile))
        costs = Curve.median(curves), Curve.median(masked), statistics.median(reading)
        result = figures(answers, problems, Writer(pair.tokenizer, own=TARGET))
        writings = {}
        for method in pair.target.methods:
            name = name_of("off", method)
            if came := sum_stats(a.speculated for a in answers[name]):
                writings[method] = writing(came, ours[name].seen)
        result["model"] = explained(answers, writings, *costs)
        result["crowds"] = asyncio.run(crowds.run(pair, watch, prompts, writings))
    return result


def figures(answers: Answers, problems: Sequence[Problem], writer: Writer) -> dict[str, Any]:
    plain = answers[PLAIN]
    found = {}
    for name, given in answers.items():
        right = [
            measure.whole(writer, problem, [*a.ids, writer.end] if a.ended else a.ids)
            for problem, a in zip(problems, given, strict=True)
        ]
        came = sum_stats(a.speculated for a in given)
        found[name] = {
            "tokens_per_s": tokens_per_s(given),
            "speedup": tokens_per_s(given) / tokens_per_s(plain),
            "accuracy": statistics.mean(right),
            "as_plain": sum(a.ids == its.ids for a, its in zip(given, plain, strict=True)),
            "tokens_per_pass": 1 + sum(came.accepted_per_position) / came.passes if came else None,
            "proposed": came.proposed_per_position if came else None,
            "accepted": came.accepted_per_position if came else None,
            "writing_share": sum(a.writing_s for a in given) / sum(a.seconds for a in given),
            "ttft_s": statistics.median(a.first_s for a in given),
            "answer_s": statistics.median(a.seconds for a in given),
        }
    return {"problems": len(problems), "contenders": found}


def explained(
    answers: Answers, writings: Mapping[MethodName, Writing], curve: Curve, masked: Curve, reading_s: float
) -> dict[str, Any]:
    """Why each method alone gains what it gains."""
    plain = answers[PLAIN]
    passes = sum(len(a.ids) + a.ended for a in plain)
    found = {}
    for method, came in writings.items():
        own = masked if method == "space" else curve
        found[method] = {
            **asdict(came),
            "tokens_per_pass": came.tokens_per_pass,
            "accepted_by_place": came.accepted_by_place,
            "proposing_s": came.proposing_s,
            "bare_pass_s": own.at(came.entries),
            "needed": needed(came, own),
            "predicted": predicted(came, own, passes, len(plain), reading_s),
            "measured": tokens_per_s(answers[name_of("off", method)]) / tokens_per_s(plain),
        }
    return {"prompt_s": reading_s, "passes": asdict(curve), "masked": asdict(masked), "methods": found}


def table(result: Mapping[str, Any]) -> str:
    lines = [
        "| contender | tokens/s | speed-up | accuracy | as `off` | tokens a pass | writing | first token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in result["contenders"].items():
        a_pass = "" if one["tokens_per_pass"] is None else f"{one['tokens_per_pass']:.2f}"
        share = f"{one['writing_share']:.0%}" if one["writing_share"] else ""
        lines.append(
            f"| {name} | {one['tokens_per_s']:.0f} | {one['speedup']:.2f} | {one['accuracy']:.1%} "
            f"| {one['as_plain']}/{result['problems']} | {a_pass} | {share} | {one['ttft_s'] * 1e3:.0f} ms |"
        )
    return "\n".join([*lines, "", _explained(result["model"]), "", crowds.table(result["crowds"])])


def _explained(model: Mapping[str, Any]) -> str:
    lines = [
        "| method | entries a pass | it takes, bare | in the engine | proposing | tokens needed | written | predicted "
        "| measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, one in model["methods"].items():
        bare_s, engine, proposing = (f"{one[n] * 1e3:.2f} ms" for n in ("bare_pass_s", "pass_s", "proposing_s"))
        lines.append(
            f"| {method} | {one['entries']:.1f} | {bare_s} | {engine} | {proposing} | {one['needed']:.2f} "
            f"| {one['tokens_per_pass']:.2f} | {one['predicted']:.2f} | {one['measured']:.2f} |"
        )
    for title, curve in (("Bare passes", model["passes"]), ("all but one masks", model["masked"])):
        sizes = zip(curve["entries"], curve["seconds"], strict=True)
        lines += ["", f"{title}: " + ", ".join(f"{size}: {s * 1e3:.2f} ms" for size, s in sizes)]
    lines += ["", f"A prompt: {model['prompt_s'] * 1e3:.2f} ms"]
    for method, one in model["methods"].items():
        lines.append(f"{method}, accepted at each place: " + " ".join(f"{s:.0%}" for s in one["accepted_by_place"]))
    return "\n".join(lines)
