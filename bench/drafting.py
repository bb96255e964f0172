"""Measures how a draft model with a parallel head should draft: which proposed tokens it should check itself.

    python -m bench.drafting --problems 100 --seed 5 --json drafting.json --plot drafting.svg

Each setting of `drafting` is measured twice. First it writes drafts only, which gives the time, the passes and the
share of correct drafts. Then it answers in modes `full` and `rounds`, with and without a speculative method of the
target. All settings take turns on every problem, and every answer starts with empty caches. Speed-ups are ratios of
answers per second to the target alone (`off` without a method), because drafted answers have fewer tokens.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench.contenders import (
    GREEDY,
    BenchResult,
    Contender,
    PipelineContender,
    accuracy_figures,
    answer_speed_figures,
    clear_caches,
    run_contenders,
)
from bench.output import add_json_argument, heading, row, write_output
from parse.config import DraftingSettings, EngineSettings, SpeculativeConfig
from parse.engines.native.engine import NativeEngine
from parse.pair import Pair
from parse.prompts import chat_prompt_token_ids
from parse.requests import GenerateRequest
from parse.types import NO_STREAMING
from training import measure
from training.confidence import format_ratio, format_share
from training.evaluate import MODELS
from training.examples import ExampleBuilder
from training.provenance import describe_run
from training.task import Problem
from training.wording import TARGET

CONFIDENCES = 0.5, 0.7, 0.8, 0.9, 0.95, 0.98
MODES = "full", "rounds"
METHODS = "none", "parallel"  # of the target
KV_CACHE_BYTES = 256 * 2**20  # each setting has a pair of its own


@dataclass(frozen=True)
class DraftingChoice:
    """A row of the table. `check` is None for a draft model without a head."""

    check: Literal["always", "unsure", "never"] | None
    confidence: float | None = None

    @property
    def name(self) -> str:
        if self.check is None:
            return "one token per pass"
        return self.check if self.confidence is None else f"{self.check} {self.confidence:g}"

    def draft_settings(self, models: Path, num_threads: int) -> EngineSettings:
        settings = EngineSettings(
            model=str(models / "demo-draft"), num_threads=num_threads, kv_cache_memory_bytes=KV_CACHE_BYTES
        )
        if self.check is None:
            return settings
        options = {} if self.confidence is None else {"confidence": self.confidence}
        head = SpeculativeConfig(method="parallel", model=str(models / "demo-draft-parallel"))
        drafting = DraftingSettings(check=self.check, **options)
        return settings.model_copy(update={"speculative_configs": (head,), "drafting": drafting})


CHOICES = (
    DraftingChoice(None),
    DraftingChoice("always"),
    *(DraftingChoice("unsure", confidence) for confidence in reversed(CONFIDENCES)),
    DraftingChoice("never"),
)


class DraftContender:
    """The draft model alone, which writes a whole draft."""

    def __init__(self, pair: Pair) -> None:
        assert isinstance(pair.draft, NativeEngine)
        self.pair, self.engine = pair, pair.draft
        self.num_passes: list[int] = []

    async def __call__(self, prompt: Sequence[int]) -> BenchResult:
        clear_caches(self.pair)
        request = GenerateRequest(prompt_token_ids=tuple(prompt), sampling_params=GREEDY, stream_interval=NO_STREAMING)
        passes_before, started = self.engine.stats.num_steps, time.perf_counter()
        ids: list[int] = []
        finish = None
        async for delta in self.engine.generate(request):
            ids += delta.token_ids
            finish = delta.finish_reason
        seconds = time.perf_counter() - started
        self.num_passes.append(self.engine.stats.num_steps - passes_before)
        return BenchResult(tuple(ids), finish == "stop", seconds, seconds)


def run(count: int, seed: int, models: Path, num_threads: int) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    problems = measure.draw_problems(seed, count, split="bench")
    target = EngineSettings(
        model=str(models / "demo-target"),
        num_threads=num_threads,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        speculative_configs=(SpeculativeConfig(method="parallel", model=str(models / "demo-parallel")),),
    )
    contenders: dict[str, Contender] = {}
    drafters: dict[str, DraftContender] = {}
    with ExitStack() as resources:
        for choice in CHOICES:
            pair = resources.enter_context(Pair(target, choice.draft_settings(models, num_threads)))
            if not contenders:
                tokenizer = pair.tokenizer
                contenders |= {_name("off", method): PipelineContender(pair, "off", method) for method in METHODS}
            drafters[choice.name] = DraftContender(pair)
            contenders[choice.name] = drafters[choice.name]
            for mode in MODES:
                for method in METHODS:
                    contenders[_name(mode, method, choice)] = PipelineContender(pair, mode, method)
        prompts = [chat_prompt_token_ids(tokenizer, [{"role": "user", "content": p.question}]) for p in problems]
        results = asyncio.run(run_contenders(contenders, prompts, lambda index: None))
    builder = ExampleBuilder(tokenizer, own=TARGET)

    def figures(name: str) -> dict[str, Any]:
        return _answer_figures(results[name], results[_name("off", "none")], problems, builder)

    return {
        "problems": len(problems),
        "baselines": {_name("off", method): figures(_name("off", method)) for method in METHODS},
        "choices": [
            {
                "name": choice.name,
                **asdict(choice),
                "draft_ms": statistics.median(a.seconds for a in results[choice.name]) * 1e3,
                "draft_tokens": statistics.mean(len(a.ids) for a in results[choice.name]),
                # The first call of the contender is a warm-up.
                "passes": statistics.mean(drafters[choice.name].num_passes[1:]),
                **accuracy_figures(results[choice.name], problems, builder),
                "modes": {
                    _name(mode, method): figures(_name(mode, method, choice)) for mode in MODES for method in METHODS
                },
            }
            for choice in CHOICES
        ],
    }


def _name(mode: str, method: str, choice: DraftingChoice | None = None) -> str:
    name = mode if method == "none" else f"{mode} + {method}"
    return name if choice is None else f"{name}, {choice.name}"


def _answer_figures(
    results: Sequence[BenchResult],
    base_results: Sequence[BenchResult],
    problems: Sequence[Problem],
    builder: ExampleBuilder,
) -> dict[str, Any]:
    return {**answer_speed_figures(results, base_results), **accuracy_figures(results, problems, builder)}


def table(result: Mapping[str, Any]) -> str:
    modes = list(result["choices"][0]["modes"])
    lines = heading("check", "draft", "tokens per pass", "correct drafts", *modes, "accuracy")
    for choice in result["choices"]:
        lowest = min(choice["modes"].values(), key=lambda mode: mode["accuracy"])
        lines.append(
            row(
                choice["name"],
                f"{choice['draft_ms']:.0f} ms",
                f"{choice['draft_tokens'] / choice['passes']:.1f}",
                format_share(choice["accuracy"], choice["accuracy_interval"]),
                *(format_ratio(mode["speedup"], mode["speedup_interval"]) for mode in choice["modes"].values()),
                format_share(lowest["accuracy"], lowest["accuracy_interval"]),
            )
        )
    baselines = ", ".join(
        f"`{name}` {baseline['speedup']:.2f} with {baseline['answers_per_s']:.2f} answers/s"
        for name, baseline in result["baselines"].items()
    )
    return "\n".join([*lines, "", f"Without drafts: {baselines}."])


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draws the share of correct drafts against the time of a draft."""
    from matplotlib import pyplot, rcParams

    rcParams["svg.hashsalt"] = "parse"  # the same figures give the same file

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    choices = result["choices"]
    axes.plot([c["draft_ms"] for c in choices], [100 * c["accuracy"] for c in choices], "o", color="#2a7")
    for choice in choices:
        position = choice["draft_ms"], 100 * choice["accuracy"]
        axes.annotate(choice["name"], position, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set_xlabel("time of a draft, ms")
    axes.set_ylabel("correct drafts, %")
    axes.set_xlim(left=0)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.drafting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=100, help="number of problems (default: 100)")
    parser.add_argument("--seed", type=int, default=5, help="seed of the problems (default: 5)")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the models")
    parser.add_argument("--threads", type=int, default=1, help="threads of each model (default: 1)")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw correct drafts against the time of a draft")
    add_json_argument(parser)
    args = parser.parse_args()
    description = describe_run(problems=args.problems, seeds=[args.seed])
    result = run(args.problems, args.seed, args.models, args.threads)
    if args.plot:
        plot(result, args.plot)
    write_output({"run": description, **result}, table(result), args.json)


if __name__ == "__main__":
    main()
