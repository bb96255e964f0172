"""PARSE in every mode against its peers, on the same problems in one run, one answer at a time.

    python -m bench.offline --problems 100 --seed 5 --json - --plot offline.svg
    python -m bench.offline --engine
    python -m bench.offline --adversary --problems 200
    python -m bench.offline --speculation --problems 80

Contenders take turns on every problem, and bare forward passes are measured between them, so that a change of the
machine's pace falls on all alike; each answer starts from empty caches. Speed-ups are ratios of tokens per second to
the target alone on this engine (`off`). The ideal counts bare forward passes only, at the acceptance that was measured:
what is missing from it is our overhead.
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import adversary, speculation, throughput
from bench.contenders import BenchResult, ResultsByContender, build_contenders, run_contenders, tokens_per_s
from parse.engines.native.kernels import optimize_modules
from parse.prompts import chat_prompt_token_ids
from training import measure
from training.evaluate import MODELS, load_pair
from training.examples import ExampleBuilder
from training.task import Problem


def summarize(
    results: ResultsByContender, problems: Sequence[Problem], costs: measure.ForwardCosts, builder: ExampleBuilder
) -> dict[str, Any]:
    speeds = {name: tokens_per_s(contender_results) for name, contender_results in results.items()}
    modes: dict[str, dict[str, Any]] = {}
    for name, contender_results in results.items():
        is_correct = [
            measure.is_correct(builder, problem, [*a.ids, builder.eos_token_id] if a.ended else a.ids)
            for problem, a in zip(problems, contender_results, strict=True)
        ]
        with_draft = [a for a in contender_results if a.draft_tokens]
        modes[name] = {
            "tokens_per_s": speeds[name],
            "speedup": speeds[name] / speeds["off"],
            "answer_s": statistics.median(a.seconds for a in contender_results),
            "accuracy": statistics.mean(is_correct),
            "accepted_share": statistics.mean(a.accepted_tokens / a.draft_tokens for a in with_draft)
            if with_draft
            else None,
            "ttft_s": statistics.median(a.ttft_s for a in contender_results),
        }
    ideal = ideal_speedup(results["full"], costs)
    return {
        "problems": len(problems),
        "modes": modes,
        "costs_ms": asdict(costs),
        "ideal_speedup": ideal,
        "of_ideal": modes["full"]["speedup"] / ideal,
    }


def ideal_speedup(full: Sequence[BenchResult], costs: measure.ForwardCosts) -> float:
    """Tokens per second of mode full over the target's, were there nothing but forward passes.

    The target reads the prompt while the drafter writes.
    """
    seconds = tokens = target_only = 0.0
    for result in full:
        drafting = costs.draft_prompt + result.draft_tokens * costs.draft_token
        verification = costs.judge_whole + (
            costs.judge_prefixes if result.accepted_tokens < result.draft_tokens else 0.0
        )
        seconds += max(drafting, costs.target_prompt) + verification + result.target_tokens * costs.target_token
        target_only += costs.target_prompt + len(result.ids) * costs.target_token
        tokens += len(result.ids)
    return target_only / seconds


def table(result: Mapping[str, Any]) -> str:
    lines = [
        "| mode | tokens/s | speed-up | accuracy | accepted | first token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, mode in result["modes"].items():
        share = "" if mode["accepted_share"] is None else f"{mode['accepted_share']:.0%}"
        lines.append(
            f"| {name} | {mode['tokens_per_s']:.0f} | {mode['speedup']:.2f} | {mode['accuracy']:.1%} | {share} "
            f"| {mode['ttft_s'] * 1e3:.0f} ms |"
        )
    lines.append("")
    costs = ", ".join(f"{name.replace('_', ' ')} {ms:.2f} ms" for name, ms in result["costs_ms"].items())
    lines.append(f"Bare costs: {costs}. Ideal {result['ideal_speedup']:.2f}, reached {result['of_ideal']:.0%} of it.")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    names = list(result["modes"])
    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    speedups = [result["modes"][name]["speedup"] for name in names]
    bars = axes.bar(
        names, speedups, color=["#888" if "_" in n or n in ("off", "sequential") else "#2a7" for n in names]
    )
    axes.bar_label(bars, [f"{s:.2f}" for s in speedups], fontsize=8)
    axes.axhline(result["ideal_speedup"], color="#333", linestyle=":", label="ideal for full")
    axes.set_ylabel("speed-up over the target alone")
    axes.tick_params(axis="x", rotation=30)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def run(count: int, seed: int, models: Path, num_threads: int) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    problems = measure.draw_problems(seed, count, split="bench")
    plain = load_pair(models)
    drafts = measure.verify_drafts(
        plain, problems[:25], measure.generate_answers(plain.draft, plain.example_builder, problems[:25]), stride=8
    )
    for model in (plain.draft, plain.target):
        optimize_modules(model)  # as the engine does, so that the costs are those of the same arithmetic
    costs: list[measure.ForwardCosts] = []
    pair, contenders = build_contenders(models, num_threads=num_threads)
    try:
        prompts = [chat_prompt_token_ids(pair.tokenizer, [{"role": "user", "content": p.question}]) for p in problems]
        results = asyncio.run(
            run_contenders(
                contenders,
                prompts,
                lambda index: costs.append(measure.measure_draft_costs(plain, drafts[index % len(drafts)])),
            )
        )
    finally:
        pair.close()
    return summarize(results, problems, measure.median_costs(costs), plain.example_builder)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--threads", type=int, default=1, help="of each model")
    parser.add_argument("--json", help="where the figures go; - for standard output")
    parser.add_argument("--plot", type=Path, help="a picture of the speed-ups")
    parser.add_argument("--engine", action="store_true", help="measure decoding, prompts and verification alone")
    parser.add_argument("--adversary", action="store_true", help="measure mode auto where every draft is wrong")
    parser.add_argument("--speculation", action="store_true", help="measure all token-level methods")
    args = parser.parse_args()
    if args.problems < 1:
        parser.error("--problems: at least 1")
    if args.engine:
        result = throughput.run(args.threads)
        text = throughput.table(result)
    elif args.adversary:
        result = adversary.run(args.problems, args.seed, args.models, args.threads)
        text = adversary.table(result)
    elif args.speculation:
        result = speculation.run(args.problems, args.seed, args.models, args.threads)
        text = speculation.table(result)
    else:
        result = run(args.problems, args.seed, args.models, args.threads)
        text = table(result)
        if args.plot:
            plot(result, args.plot)
    if args.json == "-":
        print(json.dumps(result, indent=2))
    else:
        print(text)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
