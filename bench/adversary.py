"""Measures the cost of drafting if every draft is wrong: mode auto against the target alone, including learning."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.contenders import PipelineContender
from bench.output import heading, row
from parse.config import EngineSettings
from parse.engines.protocol import Drafter
from parse.pair import Pair
from parse.prompts import chat_prompt_token_ids
from parse.requests import DraftRequest
from parse.types import TokenDelta
from training import measure
from training.confidence import throughput_ratio_interval

CORRUPTED_POSITION = 3  # index of the token in each draft that is replaced by a wrong one


class CorruptingDrafter:
    """Takes as long as the drafter it wraps, but its drafts are wrong from the first line on."""

    def __init__(self, drafter: Drafter, wrong: int) -> None:
        self.drafter, self.wrong_token = drafter, wrong

    async def draft(self, request: DraftRequest) -> AsyncGenerator[TokenDelta]:
        position = -1
        async for delta in self.drafter.draft(request):
            ids = list(delta.token_ids)
            for k in range(len(ids)):
                position += 1
                if position == CORRUPTED_POSITION:
                    ids[k] = self.wrong_token
            yield replace(delta, token_ids=tuple(ids))


def run(count: int, seed: int, models: Path, num_threads: int) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    target, draft = (
        EngineSettings(model=str(models / name), num_threads=num_threads) for name in ("demo-target", "demo-draft")
    )
    pair = Pair(target, draft)
    assert pair.pipeline.drafter is not None
    corrupting_drafter = CorruptingDrafter(pair.pipeline.drafter, wrong=pair.tokenizer.encode(" 98")[0])
    pair.pipeline = replace(pair.pipeline, drafter=corrupting_drafter)
    auto, off = PipelineContender(pair, "auto"), PipelineContender(pair, "off")
    prompts = [
        chat_prompt_token_ids(pair.tokenizer, [{"role": "user", "content": problem.question}])
        for problem in measure.draw_problems(seed, count, split="bench")
    ]

    async def run_both() -> tuple[list[Any], list[Any]]:
        await off(prompts[0])
        auto_results, off_results = [], []
        for index, prompt in enumerate(prompts):
            first, second = (auto, off) if index % 2 else (off, auto)
            answers = {first: await first(prompt), second: await second(prompt)}
            auto_results.append(answers[auto])
            off_results.append(answers[off])
        return auto_results, off_results

    try:
        auto_results, off_results = asyncio.run(run_both())
    finally:
        pair.close()
    ratios = [
        off_result.seconds / auto_result.seconds
        for auto_result, off_result in zip(auto_results, off_results, strict=True)
    ]
    ones = [1] * count
    drafted_ratios = [ratio for ratio, result in zip(ratios, auto_results, strict=True) if result.draft_tokens]
    return {
        "requests": count,
        "drafted_for": len(drafted_ratios),
        "accepted_tokens": sum(result.accepted_tokens for result in auto_results),
        "corrupted_token": CORRUPTED_POSITION + 1,
        "of_target": sum(a.seconds for a in off_results) / sum(a.seconds for a in auto_results),
        "of_target_interval": throughput_ratio_interval(
            ones, [a.seconds for a in auto_results], ones, [a.seconds for a in off_results]
        ),
        "worst_request": min(drafted_ratios, default=1.0),
        "first_request": ratios[0],
    }


def table(result: Mapping[str, Any]) -> str:
    low, high = result["of_target_interval"] or (float("nan"), float("nan"))
    return "\n".join(
        [
            *heading("requests", "with a draft", "throughput over the target alone", "slowest request with a draft"),
            row(
                str(result["requests"]),
                str(result["drafted_for"]),
                f"{result['of_target']:.3f} ({low:.3f} to {high:.3f})",
                f"{result['worst_request']:.2f}",
            ),
            "",
            f"Token {result['corrupted_token']} of every draft is replaced by a wrong one.",
        ]
    )
