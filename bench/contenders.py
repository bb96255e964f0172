"""Who competes: the pipeline in each mode, and its peers, all asked the same way."""

import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from parse.config import EngineSettings
from parse.local import LocalPair
from parse.pipeline import Pipeline
from parse.prefixes import prefix_lengths_every
from parse.protocol import Finished, GenerationRequest, Mode, TextDelta
from parse.types import MethodChoice, SamplingParams, SpeculationStats

GREEDY = SamplingParams(temperature=0.0, max_tokens=240)
MODES: tuple[Mode, ...] = ("off", "full", "progressive", "rounds", "exact", "auto")


@dataclass(frozen=True)
class Answer:
    ids: tuple[int, ...]  # without the end token
    ended: bool
    seconds: float
    first_s: float  # until the first token could be shown
    drafted: int = 0
    accepted: int = 0
    written: int = 0
    judgements: int = 0
    writing_s: float = 0.0  # of it, the target writing
    speculated: SpeculationStats | None = None


Contender = Callable[[Sequence[int]], Awaitable[Answer]]
"""From a prompt's ids to an answer."""

Answers = dict[str, list[Answer]]


async def compete(
    field: Mapping[str, Contender], prompts: Sequence[Sequence[int]], meanwhile: Callable[[int], None]
) -> Answers:
    """Everyone answers every prompt; who begins changes from prompt to prompt. `meanwhile` is called after each."""
    answers: Answers = {name: [] for name in field}
    names = list(field)
    for name in names:  # a first answer, not counted, for whatever is done once
        await field[name](prompts[0])
    for turn, prompt in enumerate(tqdm(prompts, desc="problems", unit="problem", file=sys.stderr)):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            answers[name].append(await field[name](prompt))
        meanwhile(turn)
    return answers


def tokens_per_s(answers: Sequence[Answer]) -> float:
    return sum(len(a.ids) for a in answers) / sum(a.seconds for a in answers)


def contenders(models: Path, *, threads: int) -> tuple[LocalPair, dict[str, Contender]]:
    """All of them on models of their own, for the engine changes how its models attend."""
    target, draft = models / "demo-target", models / "demo-draft"
    pair = LocalPair(
        EngineSettings(model=str(target), threads=threads),
        EngineSettings(model=str(draft), threads=threads),
    )
    peers = Peers(pair, *(AutoModelForCausalLM.from_pretrained(path).eval() for path in (target, draft)))
    ours: dict[str, Contender] = {mode: Ours(pair, mode) for mode in MODES}
    return pair, {
        **ours,
        "hf_generate": peers.generate,
        "hf_assisted": peers.assisted,
        "sequential": peers.sequential,
    }


class Ours:
    """In one mode; what the target writes itself it writes by one method."""

    def __init__(
        self, pair: LocalPair, mode: Mode, method: MethodChoice = "none", *, pipeline: Pipeline | None = None
    ) -> None:
        self.pair, self.mode, self.method = pair, mode, method
        self.pipeline = pipeline or pair.pipeline

    async def __call__(self, prompt: Sequence[int]) -> Answer:
        forget(self.pair)
        return await self.answer(prompt)

    async def answer(self, prompt: Sequence[int]) -> Answer:
        """With whatever is known of the prompt."""
        question = GenerationRequest(prompt, sampling_params=GREEDY, mode=self.mode, speculative_method=self.method)
        ids: list[int] = []
        async for event in self.pipeline.answer(question):
            match event:
                case TextDelta():
                    ids += event.token_ids
                case Finished(finish, usage):
                    pass
        return Answer(
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


def forget(pair: LocalPair) -> None:
    """Every answer starts from nothing: what one contender computed must not serve the next."""
    for service in (pair.target, pair.draft):
        if service is not None:
            service.reset_prefix_cache()


class Peers:
    """The library's own generation, and the step by step verification of SpecReason over our engine."""

    def __init__(self, pair: LocalPair, target: PreTrainedModel, draft: PreTrainedModel) -> None:
        self.pair, self.target, self.draft = pair, target, draft
        self.end = next(iter(pair.target.model.eos_token_ids))

    async def generate(self, prompt: Sequence[int]) -> Answer:
        return self._generated(prompt, None)

    async def assisted(self, prompt: Sequence[int]) -> Answer:
        return self._generated(prompt, self.draft)

    async def sequential(self, prompt: Sequence[int]) -> Answer:
        """A step, here a line, is drafted, judged, and taken or written again by the target, before the next one."""
        forget(self.pair)
        pipeline, draft, target = self.pair.pipeline, self.pair.draft, self.pair.target
        assert draft is not None
        started = time.perf_counter()
        first = 0.0
        output: list[int] = []
        drafted = accepted = written = judgements = 0
        ended = False
        line = replace(GREEDY, stop=("\n",))
        while not ended and len(output) < (GREEDY.max_tokens or 0):
            step: list[int] = []
            async for tokens in draft.generate((*prompt, *output), (), line, piece=64):
                step += tokens.token_ids
                last = tokens
            ended = last.finish_reason == "stop" and not self._line_ends(step)
            drafted += len(step)
            if step:
                cuts = prefix_lengths_every(len(step), len(step), ended=True)
                judged = await target.judge((*prompt, *output), step, cuts, pipeline.check)
                judgements += 1
                if (judged.p_correct[-1] or 0.0) >= pipeline.settings.prefix:
                    accepted += len(step)
                    output += step
                    first = first or time.perf_counter()
                    continue
            own: list[int] = []
            async for tokens in target.generate((*prompt, *output), (), line):
                own += tokens.token_ids
                first = first or time.perf_counter()
                last = tokens
            ended = last.finish_reason == "stop" and not self._line_ends(own)
            written += len(own)
            output += own
        now = time.perf_counter()
        return Answer(tuple(output), ended, now - started, first - started, drafted, accepted, written, judgements)

    def _line_ends(self, ids: Sequence[int]) -> bool:
        return "\n" in str(self.pair.tokenizer.decode(list(ids[-1:])))

    @torch.inference_mode()
    def _generated(self, prompt: Sequence[int], assistant: PreTrainedModel | None) -> Answer:
        watch = _Watch()
        started = time.perf_counter()
        out = self.target.generate(  # type: ignore[operator]
            torch.tensor([list(prompt)]),
            do_sample=False,
            max_new_tokens=GREEDY.max_tokens,
            assistant_model=assistant,
            streamer=watch,
        )
        seconds = time.perf_counter() - started
        ids = out[0, len(prompt) :].tolist()
        ended = ids[-1] == self.end
        return Answer(tuple(ids[: len(ids) - ended]), ended, seconds, watch.first - started, written=len(ids))


class _Watch:
    """A streamer that only looks at the clock."""

    def __init__(self) -> None:
        self.calls, self.first = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.first = time.perf_counter()

    def end(self) -> None:
        pass
