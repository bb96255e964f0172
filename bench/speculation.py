"""Measures every token-level method, alone and within PARSE, against what it should gain, and with many clients."""

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench import concurrency
from bench.contenders import (
    Baselines,
    BenchResult,
    Contender,
    PipelineContender,
    ResultsByContender,
    run_contenders,
    tokens_per_s,
)
from bench.forward_passes import PassRecords, PassTimeCurve, RecordingCostModel, measure_passes, measure_prefill_s
from bench.speedup_model import DecodingStats, break_even_tokens, decoding_stats, predict_speedup
from parse.config import EngineSettings, SpeculativeConfig
from parse.controller import DraftingController
from parse.pair import Pair
from parse.prompts import chat_prompt_token_ids
from parse.types import sum_stats
from training import measure
from training.examples import ExampleBuilder
from training.task import Problem
from training.wording import TARGET

MODES: tuple[str, ...] = "off", "full", "rounds"
PLAIN, NO_METHODS_LOADED = "off", "off, none loaded"


def speculation_settings(models: Path) -> tuple[SpeculativeConfig, ...]:
    """Returns settings for all methods: chains, as long as each was trained for."""
    return (
        SpeculativeConfig(method="parallel", model=str(models / "demo-parallel")),
        SpeculativeConfig(method="eagle3", model=str(models / "demo-eagle3"), num_speculative_tokens=12),
        SpeculativeConfig(method="space", model=str(models / "demo-space")),
        SpeculativeConfig(method="draft_model", model=str(models / "demo-draft")),
        SpeculativeConfig(method="ngram"),
    )


class RecordedContender:
    """A contender that records the passes of its answers."""

    def __init__(self, contender: PipelineContender, recorder: RecordingCostModel) -> None:
        self.contender, self.recorder = contender, recorder
        self.records = PassRecords()

    async def __call__(self, prompt: Sequence[int]) -> BenchResult:
        self.recorder.pop_records()
        answer = await self.contender(prompt)
        self.records += self.recorder.pop_records()
        return answer


def isolated_contender(pair: Pair, mode: str, method: str) -> PipelineContender:
    """Returns a contender with a drafting controller of its own."""
    return PipelineContender(pair, mode, method, pipeline=replace(pair.pipeline, controller=DraftingController()))


def contender_name(mode: str, method: str) -> str:
    return mode if method == "none" else f"{mode} + {method}"


def run(count: int, seed: int, models: Path, num_threads: int) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    problems = measure.draw_problems(seed, count, split="bench")
    target, draft = (
        EngineSettings(model=str(models / name), num_threads=num_threads) for name in ("demo-target", "demo-draft")
    )
    with (
        Pair(target.model_copy(update={"speculative_configs": speculation_settings(models)}), draft) as pair,
        Pair(target) as plain_pair,
    ):
        prompts = [chat_prompt_token_ids(pair.tokenizer, [{"role": "user", "content": p.question}]) for p in problems]
        recorder = RecordingCostModel(pair.target)
        choices: tuple[str, ...] = "none", *pair.target.methods
        recorded = {
            contender_name(mode, method): RecordedContender(isolated_contender(pair, mode, method), recorder)
            for mode in MODES
            for method in choices
        }
        loaded = (AutoModelForCausalLM.from_pretrained(s.model).eval() for s in (target, draft))
        baselines = Baselines(pair, *loaded)
        contenders: dict[str, Contender] = {
            **recorded,
            NO_METHODS_LOADED: PipelineContender(plain_pair, "off"),
            "hf_generate": baselines.generate,
            "hf_assisted": baselines.assisted,
        }
        model = pair.target.model
        curves: list[PassTimeCurve] = []
        masked: list[PassTimeCurve] = []
        prefill_times: list[float] = []

        def measure_passes_after(index: int) -> None:
            curves.append(measure_passes(model, 1))
            masked.append(measure_passes(model, 1, masked=True))
            prefill_times.append(measure_prefill_s(model, len(prompts[index])))

        results = asyncio.run(run_contenders(contenders, prompts, measure_passes_after))
        costs = PassTimeCurve.median(curves), PassTimeCurve.median(masked), statistics.median(prefill_times)
        result = summarize(results, problems, ExampleBuilder(pair.tokenizer, own=TARGET))
        stats_by_method = {}
        for method in pair.target.methods:
            name = contender_name("off", method)
            if speculation := sum_stats(a.speculation for a in results[name]):
                stats_by_method[method] = decoding_stats(speculation, recorded[name].records)
        result["model"] = explain_speedups(results, stats_by_method, *costs)
        result["crowds"] = asyncio.run(concurrency.run(pair, recorder, prompts, stats_by_method))
    return result


def summarize(results: ResultsByContender, problems: Sequence[Problem], builder: ExampleBuilder) -> dict[str, Any]:
    plain = results[PLAIN]
    summaries = {}
    for name, contender_results in results.items():
        is_correct = [
            measure.is_correct(builder, problem, [*a.ids, builder.eos_token_id] if a.ended else a.ids)
            for problem, a in zip(problems, contender_results, strict=True)
        ]
        speculation = sum_stats(a.speculation for a in contender_results)
        summaries[name] = {
            "tokens_per_s": tokens_per_s(contender_results),
            "speedup": tokens_per_s(contender_results) / tokens_per_s(plain),
            "accuracy": statistics.mean(is_correct),
            "as_plain": sum(
                a.ids == plain_result.ids for a, plain_result in zip(contender_results, plain, strict=True)
            ),
            "tokens_per_pass": 1 + sum(speculation.accepted_per_position) / speculation.passes if speculation else None,
            "proposed": speculation.proposed_per_position if speculation else None,
            "accepted": speculation.accepted_per_position if speculation else None,
            "writing_share": sum(a.decode_s for a in contender_results) / sum(a.seconds for a in contender_results),
            "ttft_s": statistics.median(a.ttft_s for a in contender_results),
            "answer_s": statistics.median(a.seconds for a in contender_results),
        }
    return {"problems": len(problems), "contenders": summaries}


def explain_speedups(
    results: ResultsByContender,
    stats_by_method: Mapping[str, DecodingStats],
    curve: PassTimeCurve,
    masked: PassTimeCurve,
    prefill_s: float,
) -> dict[str, Any]:
    """Why each method alone gains what it gains."""
    plain = results[PLAIN]
    passes = sum(len(a.ids) + a.ended for a in plain)
    explanations = {}
    for method, stats in stats_by_method.items():
        method_curve = masked if method == "space" else curve
        explanations[method] = {
            **stats.to_json(),
            "tokens_per_pass": stats.tokens_per_pass,
            "accepted_by_place": stats.acceptance_rates,
            "proposing_s": stats.proposal_s_per_pass,
            "bare_pass_s": method_curve.seconds_at(stats.num_tokens),
            "needed": break_even_tokens(stats, method_curve),
            "predicted": predict_speedup(stats, method_curve, passes, len(plain), prefill_s),
            "measured": tokens_per_s(results[contender_name("off", method)]) / tokens_per_s(plain),
        }
    return {"prompt_s": prefill_s, "passes": curve.to_json(), "masked": masked.to_json(), "methods": explanations}


def table(result: Mapping[str, Any]) -> str:
    lines = [
        "| contender | tokens/s | speed-up | accuracy | as `off` | tokens a pass | writing | first token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in result["contenders"].items():
        a_pass = "" if entry["tokens_per_pass"] is None else f"{entry['tokens_per_pass']:.2f}"
        share = f"{entry['writing_share']:.0%}" if entry["writing_share"] else ""
        lines.append(
            f"| {name} | {entry['tokens_per_s']:.0f} | {entry['speedup']:.2f} | {entry['accuracy']:.1%} "
            f"| {entry['as_plain']}/{result['problems']} | {a_pass} | {share} | {entry['ttft_s'] * 1e3:.0f} ms |"
        )
    return "\n".join([*lines, "", _explanation_table(result["model"]), "", concurrency.table(result["crowds"])])


def _explanation_table(model: Mapping[str, Any]) -> str:
    lines = [
        "| method | entries a pass | it takes, bare | in the engine | proposing | tokens needed | written | predicted "
        "| measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, entry in model["methods"].items():
        bare_s, engine, proposing = (f"{entry[n] * 1e3:.2f} ms" for n in ("bare_pass_s", "pass_s", "proposing_s"))
        lines.append(
            f"| {method} | {entry['entries']:.1f} | {bare_s} | {engine} | {proposing} | {entry['needed']:.2f} "
            f"| {entry['tokens_per_pass']:.2f} | {entry['predicted']:.2f} | {entry['measured']:.2f} |"
        )
    for title, curve in (("Bare passes", model["passes"]), ("all but one masks", model["masked"])):
        sizes = zip(curve["entries"], curve["seconds"], strict=True)
        lines += ["", f"{title}: " + ", ".join(f"{size}: {s * 1e3:.2f} ms" for size, s in sizes)]
    lines += ["", f"A prompt: {model['prompt_s'] * 1e3:.2f} ms"]
    for method, entry in model["methods"].items():
        lines.append(f"{method}, accepted at each place: " + " ".join(f"{s:.0%}" for s in entry["accepted_by_place"]))
    return "\n".join(lines)
