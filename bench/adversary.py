"""What drafting costs where no draft is ever right: mode auto against the target alone, warm-up included."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.contenders import Ours
from parse.config import EngineSettings
from parse.local import LocalPair
from parse.prompts import chat_prompt_token_ids
from parse.protocol import Drafter, GenerationRequest
from parse.types import TokenDelta
from training import measure

SPOILED = 3  # the token of each draft that is made wrong


class Spoiler:
    """Costs what the drafter costs, and is wrong from the first line on."""

    def __init__(self, drafter: Drafter, wrong: int) -> None:
        self.drafter, self.wrong = drafter, wrong

    async def draft(
        self, request: GenerationRequest, output: Sequence[int], *, stream_interval: int
    ) -> AsyncGenerator[TokenDelta]:
        place = -1
        async for tokens in self.drafter.draft(request, output, stream_interval=stream_interval):
            ids = list(tokens.token_ids)
            for k in range(len(ids)):
                place += 1
                if place == SPOILED:
                    ids[k] = self.wrong
            yield replace(tokens, token_ids=tuple(ids))


def run(count: int, seed: int, models: Path, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    target, draft = (
        EngineSettings(model=str(models / name), threads=threads) for name in ("demo-target", "demo-draft")
    )
    pair = LocalPair(target, draft)
    assert pair.pipeline.drafter is not None
    spoiler = Spoiler(pair.pipeline.drafter, wrong=pair.tokenizer.encode(" 98")[0])
    pair.pipeline = replace(pair.pipeline, drafter=spoiler)
    auto, off = Ours(pair, "auto"), Ours(pair, "off")
    prompts = [
        chat_prompt_token_ids(pair.tokenizer, [{"role": "user", "content": problem.question}])
        for problem in measure.problems(seed, count, split="bench")
    ]

    async def both() -> tuple[list[Any], list[Any]]:
        await off(prompts[0])
        with_drafts, alone = [], []
        for turn, prompt in enumerate(prompts):
            first, second = (auto, off) if turn % 2 else (off, auto)
            answers = {first: await first(prompt), second: await second(prompt)}
            with_drafts.append(answers[auto])
            alone.append(answers[off])
        return with_drafts, alone

    try:
        with_drafts, alone = asyncio.run(both())
    finally:
        pair.close()
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(with_drafts, alone, strict=True)]
    drafted = [ratio for ratio, answer in zip(ratios, with_drafts, strict=True) if answer.drafted]
    return {
        "requests": count,
        "drafted_for": len(drafted),
        "accepted_tokens": sum(answer.accepted for answer in with_drafts),
        "of_target": sum(a.seconds for a in alone) / sum(a.seconds for a in with_drafts),
        "worst_request": min(drafted, default=1.0),
        "first_request": ratios[0],
    }


def table(result: Mapping[str, Any]) -> str:
    return (
        f"{result['requests']} requests whose drafts are all wrong, {result['drafted_for']} of them drafted for: "
        f"{result['of_target']:.3f} of the target's own throughput; the worst request {result['worst_request']:.2f}"
    )
