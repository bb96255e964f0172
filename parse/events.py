"""The events that the pipeline reports for one answer.

These are its text, the verifications of drafts, and finally its usage.
"""

from dataclasses import dataclass
from typing import Literal

from parse.errors import FallbackCause
from parse.types import FinishReason, Logprob, SpeculationStats

Origin = Literal["draft", "target"]


@dataclass(frozen=True)
class TextDelta:
    """A part of the answer. It is final."""

    text: str
    token_ids: tuple[int, ...]
    origin: Origin
    logprobs: tuple[Logprob, ...] = ()
    reasoning: str = ""
    """The part of the model's reasoning in these tokens. It comes before `text`."""


@dataclass(frozen=True)
class PromptLogprobs:
    """The log-probability of each token of the prompt except the first one, of which there is none."""

    logprobs: tuple[Logprob, ...]


@dataclass(frozen=True)
class Verification:
    """The result of verifying a draft, or a window of one.

    The first `accepted_prefix_length` tokens are kept.
    """

    start: int
    """The number of answer tokens before the draft or window."""
    draft_token_ids: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
    p_correct: tuple[float | None, ...]
    accepted_prefix_length: int
    rejected_text: str
    answer_mass: tuple[float | None, ...] = ()
    """The probability of both answer words together, for each prefix that was evaluated."""


StageName = Literal["warm", "draft", "judge", "write"]
"""The names in the HTTP API and the metrics for prefilling, drafting, verifying and generating."""


@dataclass(frozen=True)
class Stage:
    """A stage of an answer. Its times are in seconds since the start of the answer."""

    name: StageName
    start: float
    end: float


@dataclass(frozen=True)
class Fallback:
    """Why the target answers without a draft although one was requested."""

    cause: FallbackCause
    message: str


@dataclass(frozen=True)
class Usage:
    """The token counts and times of one answer."""

    mode: str
    draft_tokens: int = 0
    accepted_tokens: int = 0
    target_tokens: int = 0
    """Tokens the target generated."""
    rounds: int = 0
    accepted_prefix_length: int | None = None
    """The number of tokens of the first draft that were kept."""
    cached_tokens: int = 0
    """The number of prompt tokens that were found in the target's prefix cache."""
    stages: tuple[Stage, ...] = ()
    ttft_s: float = 0.0
    total_s: float = 0.0
    fallback: Fallback | None = None
    speculation: SpeculationStats | None = None
    answer_mass: float | None = None
    """The smallest probability of both answer words together, over all prefixes that were evaluated."""

    @property
    def rejected_tokens(self) -> int:
        return self.draft_tokens - self.accepted_tokens

    @property
    def decoded_tokens(self) -> int:
        """The number of answer tokens that came from forward passes in which the target generated.

        In mode exact, they include the accepted tokens of the draft.
        """
        return self.target_tokens + (self.accepted_tokens if self.mode == "exact" else 0)

    def seconds(self, *names: StageName) -> float:
        return sum(stage.end - stage.start for stage in self.stages if stage.name in names)


@dataclass(frozen=True)
class Finished:
    finish_reason: FinishReason
    usage: Usage


Event = PromptLogprobs | TextDelta | Verification | Finished
