"""The state of one answer, in any mode.

It holds the output so far, the counters, and the events for the caller.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from parse.detokenizer import IncrementalDetokenizer
from parse.events import Fallback, Origin, Stage, StageName, TextDelta, Usage, Verification
from parse.reasoning import ReasoningParser
from parse.types import FinishReason, Logprob, SamplingParams, SpeculationStats, TokenDelta, sum_stats


class GenerationState:
    def __init__(
        self,
        mode: str,
        fallback: Fallback | None,
        tokenizer: PreTrainedTokenizerBase,
        sampling_params: SamplingParams,
        prompt_length: int,
        reasoning_parser: ReasoningParser,
    ) -> None:
        self.mode, self.fallback, self.tokenizer = mode, fallback, tokenizer
        self.events: asyncio.Queue[TextDelta | Verification | None] = asyncio.Queue()
        """The events in order, followed by None."""
        self.output: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.draft_tokens = self.accepted_tokens = self.target_tokens = self.rounds = 0
        self.accepted_prefix_length: int | None = None
        self._detokenizer = IncrementalDetokenizer.for_params(tokenizer, sampling_params)
        self._reasoning_parser = reasoning_parser
        self._num_chars = 0
        self._last_origin: Origin = "target"
        self._prompt_length = prompt_length
        self._cached_tokens: int | None = None
        self._speculation: SpeculationStats | None = None
        self._stages: list[Stage] = []
        self._start = time.perf_counter()
        self._first_token: float | None = None
        self._answer_mass: float | None = None

    @contextmanager
    def stage(self, name: StageName) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stages.append(Stage(name, start - self._start, time.perf_counter() - self._start))

    def record_cached(self, num_tokens: int) -> None:
        """Records how many prompt tokens were cached.

        Only the first call for a request counts.
        """
        if self._cached_tokens is None:
            self._cached_tokens = min(num_tokens, self._prompt_length)

    def record_answer_mass(self, answer_mass: Sequence[float | None], minimum: float) -> None:
        """Records the smallest probability of the answer words.

        If the probability is below the minimum at every evaluated prefix, this is recorded as the reason for the
        fallback.
        """
        values = [mass for mass in answer_mass if mass is not None]
        self._answer_mass = min([*values, *([] if self._answer_mass is None else [self._answer_mass])], default=None)
        if values and max(values) < minimum:
            self.fallback = Fallback(
                "unreliable",
                f"the draft was not verified: the two answer words have a probability of {max(values):.1%}, and "
                f"at least {minimum:.0%} is needed",
            )

    def record_draft(self, num_tokens: int) -> None:
        self.draft_tokens += num_tokens
        self.rounds += bool(num_tokens)

    def append(self, delta: TokenDelta) -> None:
        """Adds a delta of the target. Its first `num_accepted` tokens come from a draft."""
        self._speculation = sum_stats((self._speculation, delta.speculation))
        accepted = delta.num_accepted
        self.accepted_tokens += accepted
        self.target_tokens += len(delta.token_ids) - accepted
        self.emit(delta.token_ids[:accepted], "draft", delta.logprobs[:accepted])
        self.emit(delta.token_ids[accepted:], "target", delta.logprobs[accepted:])

    def emit(
        self,
        token_ids: Sequence[int],
        origin: Origin,
        logprobs: Sequence[Logprob],
        *,
        final: bool = False,
        final_text: str | None = None,
    ) -> None:
        """Adds tokens to the output and passes their text on.

        With `final`, no tokens follow, so no text is held back. If a stop string cuts the text of the last token,
        `final_text` is the text of the whole output.
        """
        if not token_ids and not final:
            return
        self._first_token = self._first_token or time.perf_counter()
        self._last_origin = origin
        self.output += token_ids
        text = self._detokenizer.add(token_ids)
        if final:
            text += self._detokenizer.finish()
            text = text if final_text is None else final_text[self._num_chars :]
        self._num_chars += len(text)
        reasoning, text = self._reasoning_parser.add(text)
        self.events.put_nowait(TextDelta(text, tuple(token_ids), origin, tuple(logprobs), reasoning))

    def close(self) -> None:
        """Reports the text that is still held back."""
        first, rest = self._reasoning_parser.add(self._detokenizer.finish()), self._reasoning_parser.finish()
        reasoning, text = first[0] + rest[0], first[1] + rest[1]
        if reasoning or text:
            self.events.put_nowait(TextDelta(text, (), self._last_origin, reasoning=reasoning))

    def usage(self) -> Usage:
        now = time.perf_counter()
        return Usage(
            mode=self.mode,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            target_tokens=self.target_tokens,
            rounds=self.rounds,
            accepted_prefix_length=self.accepted_prefix_length,
            cached_tokens=self._cached_tokens or 0,
            stages=tuple(self._stages),
            ttft_s=(self._first_token or now) - self._start,
            total_s=now - self._start,
            fallback=None if self.accepted_tokens else self.fallback,
            speculation=self._speculation,
            answer_mass=self._answer_mass,
        )
