"""The contenders of a benchmark: the pipeline in each mode and its peers, all called in the same way."""

import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from parse.config import EngineSettings
from parse.controller import DraftingController
from parse.engines.native.engine import NativeEngine
from parse.events import Finished, TextDelta
from parse.pair import Pair
from parse.requests import GenerateRequest, GenerationRequest, VerifyRequest
from parse.types import SamplingParams, SpeculationStats
from training import measure
from training.confidence import share_figures, throughput_ratio_interval
from training.examples import ExampleBuilder
from training.task import Problem

GREEDY = SamplingParams(temperature=0.0, max_tokens=240)
MODES: tuple[str, ...] = ("off", "full", "progressive", "rounds", "exact", "auto")


@dataclass(frozen=True)
class BenchResult:
    ids: tuple[int, ...]  # without the end token
    ended: bool
    seconds: float
    ttft_s: float  # seconds to the first token
    draft_tokens: int = 0
    accepted_tokens: int = 0
    target_tokens: int = 0
    num_verifications: int = 0
    decode_s: float = 0.0  # the part of `seconds` in which the target generated
    speculation: SpeculationStats | None = None


Contender = Callable[[Sequence[int]], Awaitable[BenchResult]]
"""Answers a prompt of token ids."""

ResultsByContender = dict[str, list[BenchResult]]


async def run_contenders(
    contenders: Mapping[str, Contender], prompts: Sequence[Sequence[int]], after_prompt: Callable[[int], None]
) -> ResultsByContender:
    """Runs all contenders on every prompt, in rotating order. `after_prompt` is called after each prompt."""
    results: ResultsByContender = {name: [] for name in contenders}
    names = list(contenders)
    for name in names:  # a warm-up answer, which does not count
        await contenders[name](prompts[0])
    for index, prompt in enumerate(tqdm(prompts, desc="problems", unit="problem", file=sys.stderr)):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            results[name].append(await contenders[name](prompt))
        after_prompt(index)
    return results


def tokens_per_s(results: Sequence[BenchResult]) -> float:
    return sum(len(a.ids) for a in results) / sum(a.seconds for a in results)


def speed_figures(results: Sequence[BenchResult], base_results: Sequence[BenchResult]) -> dict[str, Any]:
    """Returns the tokens per second, and the speed-up over other results for the same problems with its interval."""
    interval = None  # the ratio of a contender to itself has none
    if results is not base_results:
        interval = throughput_ratio_interval(
            [len(a.ids) for a in results],
            [a.seconds for a in results],
            [len(a.ids) for a in base_results],
            [a.seconds for a in base_results],
        )
    return {
        "tokens_per_s": tokens_per_s(results),
        "speedup": tokens_per_s(results) / tokens_per_s(base_results),
        "speedup_interval": interval,
    }


def answer_speed_figures(results: Sequence[BenchResult], base_results: Sequence[BenchResult]) -> dict[str, Any]:
    """Returns the answers per second, and their ratio to other results for the same problems with its interval."""
    seconds, base_seconds = ([a.seconds for a in each] for each in (results, base_results))
    interval = None  # the ratio of a contender to itself has none
    if results is not base_results:
        ones = [1] * len(results)
        interval = throughput_ratio_interval(ones, seconds, ones, base_seconds)
    return {
        "answers_per_s": len(results) / sum(seconds),
        "speedup": sum(base_seconds) / sum(seconds),
        "speedup_interval": interval,
    }


def accuracy_figures(
    results: Sequence[BenchResult], problems: Sequence[Problem], builder: ExampleBuilder
) -> dict[str, Any]:
    """Returns the share of answers with every step correct, with the number of answers and the interval."""
    is_correct = [
        measure.is_correct(builder, problem, [*a.ids, builder.eos_token_id] if a.ended else a.ids)
        for problem, a in zip(problems, results, strict=True)
    ]
    return share_figures("accuracy", is_correct)


def build_contenders(models: Path, *, num_threads: int) -> tuple[Pair, dict[str, Contender]]:
    """Returns all contenders. The baselines have models of their own, because the engine replaces attention."""
    target, draft = models / "demo-target", models / "demo-draft"
    pair = Pair(
        EngineSettings(model=str(target), num_threads=num_threads),
        EngineSettings(model=str(draft), num_threads=num_threads),
    )
    baselines = Baselines(pair, *(AutoModelForCausalLM.from_pretrained(path).eval() for path in (target, draft)))
    pipeline_contenders: dict[str, Contender] = {mode: PipelineContender(pair, mode) for mode in MODES}
    return pair, {
        **pipeline_contenders,
        "hf_generate": baselines.generate,
        "hf_assisted": baselines.assisted,
        "sequential": baselines.sequential,
    }


class PipelineContender:
    """The pipeline in one mode, with the default token-level method or a given one for the tokens of the target.

    Every contender has a drafting controller of its own, so that mode `auto` does not learn from the other contenders.
    """

    def __init__(self, pair: Pair, mode: str, method: str | None = None) -> None:
        self.pair, self.mode, self.method = pair, mode, method
        self.pipeline = replace(pair.pipeline, controller=DraftingController())

    async def __call__(self, prompt: Sequence[int]) -> BenchResult:
        clear_caches(self.pair)
        return await self.answer_prompt(prompt)

    async def answer_prompt(self, prompt: Sequence[int]) -> BenchResult:
        """Answers without clearing the caches first."""
        request = GenerationRequest(prompt, sampling_params=GREEDY, mode=self.mode, speculative_method=self.method)
        ids: list[int] = []
        async for event in self.pipeline.generate(request):
            match event:
                case TextDelta():
                    ids += event.token_ids
                case Finished(finish, usage):
                    pass
        return BenchResult(
            tuple(ids),
            finish == "stop",
            usage.total_s,
            usage.ttft_s,
            usage.draft_tokens,
            usage.accepted_tokens,
            usage.target_tokens,
            usage.rounds,
            usage.seconds("write"),
            usage.speculation,
        )


def native_target(pair: Pair) -> NativeEngine:
    """Returns the target of a pair whose measurements need the native engine."""
    assert isinstance(pair.target, NativeEngine)
    return pair.target


def clear_caches(pair: Pair) -> None:
    """Clears the prefix caches, so that no contender benefits from the one before."""
    for engine in (pair.target, pair.draft):
        if isinstance(engine, NativeEngine):
            engine.reset_prefix_cache()


class Baselines:
    """Generation by Hugging Face, and the stepwise verification of SpecReason on the native engine."""

    def __init__(self, pair: Pair, target: PreTrainedModel, draft: PreTrainedModel) -> None:
        self.pair, self.target, self.draft = pair, target, draft
        self.eos_token_id = next(iter(pair.target.capabilities().eos_token_ids))

    async def generate(self, prompt: Sequence[int]) -> BenchResult:
        return self._run_generate(prompt, None)

    async def assisted(self, prompt: Sequence[int]) -> BenchResult:
        return self._run_generate(prompt, self.draft)

    async def sequential(self, prompt: Sequence[int]) -> BenchResult:
        """Drafts and verifies one step (a line) at a time. The target generates a rejected step itself."""
        clear_caches(self.pair)
        pipeline, draft, target = self.pair.pipeline, self.pair.draft, self.pair.target
        assert draft is not None
        started = time.perf_counter()
        first_token_at = 0.0
        output: list[int] = []
        draft_tokens = accepted_tokens = target_tokens = num_verifications = 0
        ended = False
        line_params = replace(GREEDY, stop=("\n",))

        def line_request(output: Sequence[int]) -> GenerateRequest:
            # The earlier lines are part of the prompt, because they contain the stop string.
            return GenerateRequest(prompt_token_ids=(*prompt, *output), sampling_params=line_params)

        while not ended and len(output) < (GREEDY.max_tokens or 0):
            step: list[int] = []
            async for delta in draft.generate(replace(line_request(output), stream_interval=64)):
                step += delta.token_ids
                last = delta
            ended = last.finish_reason == "stop" and not self._ends_line(step)
            draft_tokens += len(step)
            if step:
                verification = await target.verify(
                    VerifyRequest(
                        prompt_token_ids=(*prompt, *output),
                        draft_token_ids=step,
                        prefix_lengths=[len(step)],
                        suffix=pipeline.suffix,
                        policy=None,
                    )
                )
                num_verifications += 1
                if (verification.p_correct[-1] or 0.0) >= pipeline.settings.prefix:
                    accepted_tokens += len(step)
                    output += step
                    first_token_at = first_token_at or time.perf_counter()
                    continue
            rewritten: list[int] = []
            async for delta in target.generate(line_request(output)):
                rewritten += delta.token_ids
                first_token_at = first_token_at or time.perf_counter()
                last = delta
            ended = last.finish_reason == "stop" and not self._ends_line(rewritten)
            target_tokens += len(rewritten)
            output += rewritten
        now = time.perf_counter()
        return BenchResult(
            tuple(output),
            ended,
            now - started,
            first_token_at - started,
            draft_tokens,
            accepted_tokens,
            target_tokens,
            num_verifications,
        )

    def _ends_line(self, ids: Sequence[int]) -> bool:
        return "\n" in str(self.pair.tokenizer.decode(list(ids[-1:])))

    @torch.inference_mode()
    def _run_generate(self, prompt: Sequence[int], assistant: PreTrainedModel | None) -> BenchResult:
        timer = _FirstTokenTimer()
        started = time.perf_counter()
        out = self.target.generate(  # type: ignore[operator]
            torch.tensor([list(prompt)]),
            do_sample=False,
            max_new_tokens=GREEDY.max_tokens,
            assistant_model=assistant,
            streamer=timer,
        )
        seconds = time.perf_counter() - started
        ids = out[0, len(prompt) :].tolist()
        ended = ids[-1] == self.eos_token_id
        return BenchResult(
            tuple(ids[: len(ids) - ended]), ended, seconds, timer.first_token_at - started, target_tokens=len(ids)
        )


class _FirstTokenTimer:
    """A streamer that records the time of the first token."""

    def __init__(self) -> None:
        self.calls, self.first_token_at = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.first_token_at = time.perf_counter()

    def end(self) -> None:
        pass
