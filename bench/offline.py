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
from bench.contenders import Answer, Answers, compete, contenders, tokens_per_s
from parse.engines.native.kernels import optimize_modules
from parse.prompts import chat_prompt_token_ids
from training import measure
from training.evaluate import MODELS, load_pair
from training.rows import Writer
from training.task import Problem


def figures(answers: Answers, problems: Sequence[Problem], costs: measure.Costs, writer: Writer) -> dict[str, Any]:
    speeds = {name: tokens_per_s(given) for name, given in answers.items()}
    modes: dict[str, dict[str, Any]] = {}
    for name, given in answers.items():
        right = [
            measure.whole(writer, problem, [*a.ids, writer.end] if a.ended else a.ids)
            for problem, a in zip(problems, given, strict=True)
        ]
        drafted = [a for a in given if a.drafted]
        modes[name] = {
            "tokens_per_s": speeds[name],
            "speedup": speeds[name] / speeds["off"],
            "answer_s": statistics.median(a.seconds for a in given),
            "accuracy": statistics.mean(right),
            "accepted_share": statistics.mean(a.accepted / a.drafted for a in drafted) if drafted else None,
            "ttft_s": statistics.median(a.first_s for a in given),
        }
    ideal = ideal_speedup(answers["full"], costs)
    return {
        "problems": len(problems),
        "modes": modes,
        "costs_ms": asdict(costs),
        "ideal_speedup": ideal,
        "of_ideal": modes["full"]["speedup"] / ideal,
    }


def ideal_speedup(full: Sequence[Answer], costs: measure.Costs) -> float:
    """Tokens per second of mode full over the target's, were there nothing but forward passes.

    The target reads the prompt while the drafter writes.
    """
    seconds = tokens = alone = 0.0
    for answer in full:
        drafting = costs.draft_prompt + answer.drafted * costs.draft_token
        judging = costs.judge_whole + (costs.judge_prefixes if answer.accepted < answer.drafted else 0.0)
        seconds += max(drafting, costs.target_prompt) + judging + answer.written * costs.target_token
        alone += costs.target_prompt + len(answer.ids) * costs.target_token
        tokens += len(answer.ids)
    return alone / seconds


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


def run(count: int, seed: int, models: Path, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    problems = measure.problems(seed, count, split="bench")
    plain = load_pair(models)
    drafts = measure.judged(plain, problems[:25], measure.answers(plain.draft, plain.writer, problems[:25]), stride=8)
    for model in (plain.draft, plain.target):
        optimize_modules(model)  # as the engine does, so that the costs are those of the same arithmetic
    costs: list[measure.Costs] = []
    pair, field = contenders(models, threads=threads)
    try:
        prompts = [chat_prompt_token_ids(pair.tokenizer, [{"role": "user", "content": p.question}]) for p in problems]
        answers = asyncio.run(
            compete(field, prompts, lambda turn: costs.append(measure.costs_of(plain, drafts[turn % len(drafts)])))
        )
    finally:
        pair.close()
    return figures(answers, problems, measure.median(costs), plain.writer)


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
    parser.add_argument("--speculation", action="store_true", help="measure all ways to write several tokens in a pass")
    args = parser.parse_args()
    if args.problems < 1:
        parser.error("--problems: at least 1")
    if args.engine:
        result = throughput.run(args.threads)
        shown = throughput.table(result)
    elif args.adversary:
        result = adversary.run(args.problems, args.seed, args.models, args.threads)
        shown = adversary.table(result)
    elif args.speculation:
        result = speculation.run(args.problems, args.seed, args.models, args.threads)
        shown = speculation.table(result)
    else:
        result = run(args.problems, args.seed, args.models, args.threads)
        shown = table(result)
        if args.plot:
            plot(result, args.plot)
    if args.json == "-":
        print(json.dumps(result, indent=2))
    else:
        print(shown)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
