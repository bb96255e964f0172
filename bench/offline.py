"""Measures PARSE in every mode and its peers on the same problems in one run, one answer at a time.

    python -m bench.offline --problems 100 --seed 5 --json offline.json --plot offline.svg
    python -m bench.offline --speculation --problems 60   # all token-level methods
    python -m bench.offline --adversary --problems 200    # mode auto if every draft is wrong
    python -m bench.offline --engine                      # the engine against generate()

Contenders take turns on every problem. Forward passes without the engine are measured in turns with them, so that a
change of the machine's speed affects all of them. Every answer starts with empty caches. Speed-ups are ratios of tokens
per second to the target alone on this engine (`off`). The ideal speed-up is computed from the measured acceptance and
the times of these forward passes. The difference from it is our overhead. `--problems 4 --rounds 1` gives a short run
to try the program.
"""

import argparse
import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import adversary, engine_speed, speculation
from bench.contenders import (
    BenchResult,
    ResultsByContender,
    accuracy_figures,
    build_contenders,
    run_contenders,
    speed_figures,
)
from bench.output import add_json_argument, heading, milliseconds, row, write_output
from parse.engines.native.kernels import optimize_network
from parse.engines.native.plan_store import ModelPlan
from parse.prompts import chat_prompt_token_ids
from training import measure
from training.confidence import format_ratio, format_share
from training.evaluate import MODELS, load_pair
from training.examples import ExampleBuilder
from training.provenance import describe_run
from training.task import Problem

DESCRIPTIONS = {
    "off": "`off`: the target alone",
    "full": "`full`: the complete draft is verified at once",
    "rounds": "`rounds`: the drafter continues after a correction",
    "progressive": "`progressive`: a window is verified while the next one is drafted",
    "auto": "`auto`: the default, drafts as long as this saves time",
    "hf_generate": "`generate()` of `transformers`",
    "hf_assisted": "assisted generation of `transformers`",
}


def summarize(
    results: ResultsByContender, problems: Sequence[Problem], costs: measure.ForwardCosts, builder: ExampleBuilder
) -> dict[str, Any]:
    modes: dict[str, dict[str, Any]] = {}
    for name, contender_results in results.items():
        with_draft = [a for a in contender_results if a.draft_tokens]
        modes[name] = {
            **speed_figures(contender_results, results["off"]),
            "answer_s": statistics.median(a.seconds for a in contender_results),
            **accuracy_figures(contender_results, problems, builder),
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
    """Returns the speed-up of mode `full` if nothing but forward passes took time.

    It assumes that the target computes the prompt while the drafter writes.
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
    lines = heading("mode", "tokens/s", "speed-up", "accuracy", "accepted", "first token")
    for name, mode in result["modes"].items():
        share = "" if mode["accepted_share"] is None else f"{mode['accepted_share']:.0%}"
        speedup, accuracy = _ratio_and_accuracy(mode)
        lines.append(
            row(name, f"{mode['tokens_per_s']:.0f}", speedup, accuracy, share, f"{mode['ttft_s'] * 1e3:.0f} ms")
        )
    costs = ", ".join(f"{name.replace('_', ' ')} {ms:.2f} ms" for name, ms in result["costs_ms"].items())
    lines += [
        "",
        f"Bare costs: {costs}. The ideal speed-up of `full` is {result['ideal_speedup']:.2f}; it reaches "
        f"{result['of_ideal']:.0%} of it.",
    ]
    return "\n".join(lines)


def summary_table(result: Mapping[str, Any]) -> str:
    """Returns the table of the README: the modes that a user chooses from, and the library."""
    lines = heading("mode", "speed-up", "accuracy", "first token")
    for name, description in DESCRIPTIONS.items():
        mode = result["modes"][name]
        lines.append(row(description, *_ratio_and_accuracy(mode), milliseconds(mode["ttft_s"])))
    return "\n".join(lines)


def _ratio_and_accuracy(mode: Mapping[str, Any]) -> tuple[str, str]:
    return (
        format_ratio(mode["speedup"], mode["speedup_interval"]),
        format_share(mode["accuracy"], mode["accuracy_interval"]),
    )


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws the speed-ups."""
    from matplotlib import pyplot, rcParams

    rcParams["svg.hashsalt"] = "parse"  # the same figures give the same file

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
    figure.savefig(path, metadata={"Date": None})


def run(count: int, seed: int, models: Path, num_threads: int) -> dict[str, Any]:
    """Runs all modes and peers on the same problems."""
    torch.set_num_threads(num_threads)
    problems = measure.draw_problems(seed, count, split="bench")
    plain = load_pair(models)
    drafts = measure.verify_drafts(
        plain, problems[:25], measure.generate_answers(plain.draft, plain.example_builder, problems[:25]), stride=8
    )
    for model in (plain.draft, plain.target):
        optimize_network(model, ModelPlan.of(model))  # so that the costs are those of the engine's kernels
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
    args = _arguments()
    description = describe_run(
        problems=None if args.engine else args.problems, seeds=[] if args.engine else [args.seed]
    )
    if args.engine:
        result = engine_speed.run(args.threads, args.rounds)
        text = engine_speed.table(result)
    elif args.adversary:
        result = adversary.run(args.problems, args.seed, args.models, args.threads)
        text = adversary.table(result)
    elif args.speculation:
        result = speculation.run(args.problems, args.seed, args.models, args.threads, args.rounds)
        text = speculation.tables(result)
    else:
        result = run(args.problems, args.seed, args.models, args.threads)
        text = table(result)
        if args.plot:
            plot(result, args.plot)
    write_output({"run": description, **result}, text, args.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--engine", action="store_true", help="measure decoding, prompts and verification of the engine")
    kind.add_argument("--adversary", action="store_true", help="measure mode auto if every draft is wrong")
    kind.add_argument("--speculation", action="store_true", help="measure all token-level methods")
    parser.add_argument("--problems", type=int, help="number of problems (default: 100); not with --engine")
    parser.add_argument("--seed", type=int, help="seed of the problems (default: 5); not with --engine")
    parser.add_argument("--models", type=Path, help="folder of the models; not with --engine")
    parser.add_argument(
        "--rounds", type=int, help="rounds of --engine (default: 5) and of many clients with --speculation (default: 3)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each model (default: 1)")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the speed-ups of the modes")
    add_json_argument(parser)
    args = parser.parse_args()
    measures_modes = not (args.engine or args.adversary or args.speculation)
    for name in ("problems", "seed", "models"):
        if args.engine and getattr(args, name) is not None:
            parser.error(f"--{name} has no effect with --engine")
    if args.plot and not measures_modes:
        parser.error("--plot draws the modes only")
    if args.rounds is not None and not (args.engine or args.speculation):
        parser.error("--rounds applies to --engine and --speculation only")
    args.problems = 100 if args.problems is None else args.problems
    args.seed = 5 if args.seed is None else args.seed
    args.models = args.models or MODELS
    args.rounds = args.rounds or (engine_speed.ROUNDS if args.engine else speculation.ROUNDS)
    for name in ("problems", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: at least 1")
    return args


if __name__ == "__main__":
    main()
