"""Measures what the verification of long drafts costs, in decode steps.

    python -m bench.long_drafts --model PATH --json PATH [--plot PATH]

The drafts consist of random tokens, and all their prefixes pass except the complete draft. The search therefore needs
all its passes. *Cached* means that the target has already computed the draft, for example while it was written.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.engine_speed import random_prompts
from bench.output import add_json_argument, heading, row, write_output
from bench.smollm2 import find_model
from parse.acceptance import AcceptancePolicy, Thresholds
from parse.config import EngineSettings, VerificationSettings
from parse.engines.native.engine import NativeEngine
from parse.engines.native_loader import load_native_engine
from parse.prefixes import prefix_lengths_every
from parse.prompts import build_verification_suffix
from parse.requests import GenerateRequest, VerifyRequest
from parse.types import SamplingParams
from training.provenance import describe_run

PROMPT_TOKENS = 64
DRAFT_LENGTHS = 100, 250, 500, 1000, 2000, 4000, 8000
STRIDE = 64
ROUNDS = 3
DECODE_TOKENS = 9


async def decode_step_s(engine: NativeEngine, context: list[int]) -> float:
    """Returns the seconds of a step of one token after a context that is cached."""
    seconds = []
    for num_tokens in (1, DECODE_TOKENS):
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        started = time.perf_counter()
        async for _ in engine.generate(GenerateRequest(prompt_token_ids=context, sampling_params=params)):
            pass
        seconds.append(time.perf_counter() - started)
    return (seconds[1] - seconds[0]) / (DECODE_TOKENS - 1)


async def measure(engine: NativeEngine, length: int, rounds: int, vocab_size: int) -> dict[str, Any]:
    settings = VerificationSettings.for_model(engine.name)
    suffix = build_verification_suffix(engine.tokenizer, settings.prompt, settings.correct, settings.incorrect)
    times: dict[str, list[float]] = {name: [] for name in ("uncached", "cached", "exhaustive", "prefill", "step")}
    num_passes = 0
    for number in range(rounds):
        (tokens,) = random_prompts(1, PROMPT_TOKENS + length, seed=1000 * length + number, vocab_size=vocab_size)
        prompt, draft = tokens[:PROMPT_TOKENS], tokens[PROMPT_TOKENS:]

        async def verify_s(exhaustive: bool, prompt: list[int] = prompt, draft: list[int] = draft) -> float:
            request = VerifyRequest(
                prompt_token_ids=prompt,
                draft_token_ids=draft,
                draft_complete=True,
                prefix_lengths=prefix_lengths_every(STRIDE, length, complete=True),
                suffix=suffix,
                policy=AcceptancePolicy(Thresholds(full=1.0, prefix=0.0), exhaustive=exhaustive),
            )
            started = time.perf_counter()
            await engine.verify(request)
            return time.perf_counter() - started

        await engine.prefill(prompt)
        times["uncached"].append(await verify_s(exhaustive=False))
        steps_before = engine.stats.num_steps
        times["cached"].append(await verify_s(exhaustive=False))
        num_passes = engine.stats.num_steps - steps_before
        times["exhaustive"].append(await verify_s(exhaustive=True))
        times["step"].append(await decode_step_s(engine, tokens))
        engine.reset_prefix_cache()
        started = time.perf_counter()
        await engine.prefill(tokens)
        times["prefill"].append(time.perf_counter() - started)
        engine.reset_prefix_cache()
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "draft_tokens": length,
        "prefixes": len(prefix_lengths_every(STRIDE, length, complete=True)),
        "passes": num_passes,
        **{f"{name}_s": seconds for name, seconds in median.items()},
        **{f"{name}_steps": median[name] / median["step"] for name in ("cached", "exhaustive", "uncached", "prefill")},
        "kv_cache_mb": (PROMPT_TOKENS + length) * engine.model.bytes_per_token / 2**20,
    }


def table(document: Mapping[str, Any]) -> str:
    run = document.get("run")
    processor = f" on {run['processor']['model']}" if run else ""
    names = (
        *("draft tokens", "prefixes", "passes", "cached", "in decode steps", "all prefixes", "not cached"),
        *("prefill of the draft", "KV cache"),
    )
    lines = [
        f"{document['model']}, float32, 1 thread{processor}. Stride {STRIDE}. Decode steps have the same context.",
        "",
        *heading(*names),
    ]
    for each in document["rows"]:
        cells = [
            str(each["draft_tokens"]),
            str(each["prefixes"]),
            str(each["passes"]),
            f"{each['cached_s']:.2f} s",
            f"{each['cached_steps']:.1f}",
            f"{each['exhaustive_steps']:.1f}",
            f"{each['uncached_steps']:.1f}",
            f"{each['prefill_steps']:.1f}",
            f"{each['kv_cache_mb']:.0f} MB",
        ]
        lines.append(row(*cells))
    return "\n".join(lines)


def plot(document: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    lengths = [each["draft_tokens"] for each in document["rows"]]
    for name, label in (
        ("prefill", "prefill of prompt and draft"),
        ("uncached", "verification, draft not cached"),
        ("exhaustive", "verification of all prefixes, cached"),
        ("cached", "verification with search, cached"),
    ):
        axes.loglog(lengths, [each[f"{name}_s"] for each in document["rows"]], marker="o", label=label)
    axes.set_xlabel("draft tokens")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=find_model, required=True, help="a local path, a Hugging Face id or smollm2")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--lengths",
        type=lambda text: tuple(map(int, text.split(","))),
        default=DRAFT_LENGTHS,
        help="for example 100,500",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="file for a plot of the times")
    add_json_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    description = describe_run()
    engine = load_native_engine(
        EngineSettings(
            model=options.model,
            num_threads=1,
            max_model_len=PROMPT_TOKENS + max(options.lengths) + 64,
            max_num_seqs=4,
        )
    )
    try:
        vocab_size = engine.model.vocab_size
        asyncio.run(measure(engine, min(options.lengths), 1, vocab_size))
        rows = [asyncio.run(measure(engine, length, options.rounds, vocab_size)) for length in sorted(options.lengths)]
    finally:
        engine.shutdown()
    document = {"model": Path(options.model).name, "stride": STRIDE, "rows": rows, "run": description}
    if options.plot:
        plot(document, options.plot)
    write_output(document, table(document), options.json)


if __name__ == "__main__":
    main()
