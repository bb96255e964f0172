"""Measures every token-level method alone, within PARSE and with many clients, and compares it with a prediction."""

import asyncio
import statistics
from collections.abc import Mapping, Sequence
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
    accuracy_figures,
    native_target,
    run_contenders,
    speed_figures,
    tokens_per_s,
)
from bench.forward_passes import PassRecords, PassTimeCurve, RecordingCostModel, measure_passes, measure_prefill_s
from bench.output import heading, row
from bench.speedup_model import DecodingStats, break_even_tokens, decoding_stats, predict_speedup
from parse.config import EngineSettings, SpeculativeConfig
from parse.pair import Pair
from parse.prompts import chat_prompt_token_ids
from parse.types import sum_stats
from training import measure
from training.confidence import format_ratio, format_share
from training.examples import ExampleBuilder
from training.task import Problem
from training.wording import TARGET

MODES: tuple[str, ...] = "off", "full", "rounds"
PLAIN, NO_METHODS_LOADED = "off", "off, none loaded"
ROUNDS = 3  # of the runs with many clients


def speculation_settings(models: Path) -> tuple[SpeculativeConfig, ...]:
    """Returns settings for all methods. Each proposes chains that are as long as its head was trained for."""
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


def contender_name(mode: str, method: str) -> str:
    return mode if method == "none" else f"{mode} + {method}"


def run(count: int, seed: int, models: Path, num_threads: int, rounds: int = ROUNDS) -> dict[str, Any]:
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
        recorder = RecordingCostModel(native_target(pair))
        choices: tuple[str, ...] = "none", *native_target(pair).methods
        recorded = {
            contender_name(mode, method): RecordedContender(PipelineContender(pair, mode, method), recorder)
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
        model = native_target(pair).model
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
        for method in native_target(pair).methods:
            name = contender_name("off", method)
            if speculation := sum_stats(a.speculation for a in results[name]):
                stats_by_method[method] = decoding_stats(speculation, recorded[name].records)
        result["model"] = explain_speedups(results, stats_by_method, *costs)
        result["crowds"] = asyncio.run(concurrency.run(pair, recorder, prompts, stats_by_method, rounds))
    return result


def summarize(results: ResultsByContender, problems: Sequence[Problem], builder: ExampleBuilder) -> dict[str, Any]:
    plain = results[PLAIN]
    summaries = {}
    for name, contender_results in results.items():
        speculation = sum_stats(a.speculation for a in contender_results)
        summaries[name] = {
            **speed_figures(contender_results, plain),
            **accuracy_figures(contender_results, problems, builder),
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
    if NO_METHODS_LOADED in results:
        base_speed = tokens_per_s(results[NO_METHODS_LOADED])
        for summary in summaries.values():
            summary["speedup_over_none_loaded"] = summary["tokens_per_s"] / base_speed
    return {"problems": len(problems), "contenders": summaries}


def explain_speedups(
    results: ResultsByContender,
    stats_by_method: Mapping[str, DecodingStats],
    curve: PassTimeCurve,
    masked: PassTimeCurve,
    prefill_s: float,
) -> dict[str, Any]:
    """Returns what determines the speed-up of each method alone, and the predicted and the measured speed-up."""
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


def tables(result: Mapping[str, Any]) -> str:
    """Returns all tables."""
    parts = contender_table(result), reasons_table(result), positions_table(result), passes_table(result)
    return "\n\n".join([*parts, concurrency.table(result["crowds"])])


def contender_table(result: Mapping[str, Any]) -> str:
    names = (
        "tokens/s",
        "speed-up",
        "over none loaded",
        "accuracy",
        "as `off`",
        "tokens per pass",
        "generating",
        "first token",
    )
    lines = heading("contender", *names)
    for name, entry in result["contenders"].items():
        tokens_per_pass, share = entry["tokens_per_pass"], entry["writing_share"]
        lines.append(
            row(
                name,
                f"{entry['tokens_per_s']:.0f}",
                format_ratio(entry["speedup"], entry["speedup_interval"]),
                f"{entry['speedup_over_none_loaded']:.2f}",
                format_share(entry["accuracy"], entry["accuracy_interval"]),
                f"{entry['as_plain']}/{result['problems']}",
                "" if tokens_per_pass is None else f"{tokens_per_pass:.2f}",
                f"{share:.0%}" if share else "",
                f"{entry['ttft_s'] * 1e3:.0f} ms",
            )
        )
    return "\n".join(lines)


def grid_table(result: Mapping[str, Any]) -> str:
    """Returns the table of the README: the speed-up of each mode with each method."""
    methods = list(result["model"]["methods"])
    lines = heading("mode", "none", *(f"`{method}`" for method in methods))
    for mode in MODES:
        entries = [result["contenders"][contender_name(mode, method)] for method in ("none", *methods)]
        lines.append(row(f"`{mode}`", *(format_ratio(e["speedup"], e["speedup_interval"]) for e in entries)))
    return "\n".join(lines)


def reasons_table(result: Mapping[str, Any]) -> str:
    names = "computed per pass", "bare pass", "in the engine", "proposal", "tokens needed", "tokens per pass"
    lines = heading("method", *names, "predicted", "measured")
    for method, entry in result["model"]["methods"].items():
        times = (f"{entry[name] * 1e3:.2f} ms" for name in ("bare_pass_s", "pass_s", "proposing_s"))
        figures = (f"{entry[name]:.2f}" for name in ("needed", "tokens_per_pass", "predicted", "measured"))
        lines.append(row(method, f"{entry['entries']:.1f}", *times, *figures))
    return "\n".join(lines)


def positions_table(result: Mapping[str, Any]) -> str:
    rates = {method: entry["accepted_by_place"] for method, entry in result["model"]["methods"].items()}
    length = max((len(shares) for shares in rates.values()), default=0)
    lines = heading("accepted at position", *map(str, range(1, length + 1)))
    for method, shares in rates.items():
        lines.append(row(method, *(f"{share:.0%}" for share in shares), *[""] * (length - len(shares))))
    return "\n".join(lines)


def passes_table(result: Mapping[str, Any]) -> str:
    model = result["model"]
    curves = {"one sequence": model["passes"], "one sequence, all tokens but the first are masks": model["masked"]}
    curves |= {f"{entry['clients']} sequences": entry["bare"] for entry in result["crowds"]}
    lines = heading("ms of a pass, by tokens of each sequence", *map(str, model["passes"]["entries"]))
    for name, curve in curves.items():
        lines.append(row(name, *(f"{seconds * 1e3:.1f}" for seconds in curve["seconds"])))
    return "\n".join([*lines, "", f"A prompt takes {model['prompt_s'] * 1e3:.2f} ms."])
