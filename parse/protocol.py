"""What goes into the pipeline and comes out of it, and what it asks of its two services."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from parse.acceptance import Thresholds
from parse.prompts import Message, VerificationSuffix
from parse.types import (
    FallbackCause,
    FinishReason,
    Logprob,
    MethodChoice,
    RequestError,
    SamplingParams,
    SpeculationStats,
    TokenDelta,
    VerifyResult,
)

Mode = Literal["auto", "full", "progressive", "rounds", "exact", "off"]
Origin = Literal["draft", "target"]
NO_STREAMING = 1 << 30  # tokens: a piece that holds whatever there is


@dataclass(frozen=True)
class GenerationRequest:
    """What is to be answered, and how."""

    prompt_token_ids: Sequence[int]  # in the target's tokens, up to and including the assistant header
    messages: Sequence[Message] = ()  # for a drafter that reads them in a template of its own
    sampling_params: SamplingParams = SamplingParams()
    mode: Mode = "auto"
    thresholds: Thresholds | None = None
    prediction: Sequence[int] | None = None
    """The caller's own draft, in the target's tokens."""
    stream_interval: int = 1
    """Tokens the target writes before they are passed on; fewer, larger pieces are cheaper where nobody reads along."""
    speculative_method: MethodChoice | None = None
    """How the target writes several tokens in a pass, "none": one by one; by default as its settings say."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise RequestError("mode", f"must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if self.speculative_method not in (None, *get_args(MethodChoice)):
            choices = ", ".join(get_args(MethodChoice))
            raise RequestError("speculation", f"must be one of {choices}, got {self.speculative_method!r}")


class Drafter(Protocol):
    def draft(
        self, request: GenerationRequest, output: Sequence[int], *, stream_interval: int
    ) -> AsyncGenerator[TokenDelta]:
        """Writes on after `output`, in the target's tokens, in pieces of about that many."""
        ...


class Verifier(Protocol):
    async def warm(self, prompt: Sequence[int]) -> int:
        """Reads a prompt ahead of time; says how many of its tokens were known already."""
        ...

    async def judge(
        self,
        prompt: Sequence[int],
        draft: Sequence[int],
        cuts: Sequence[int],
        check: VerificationSuffix,
        *,
        full: float | None = None,
        prefix: float | None = None,
        logprobs: int | None = None,
    ) -> VerifyResult: ...

    def generate(
        self,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        sampling: SamplingParams = ...,
        *,
        proposal: Sequence[int] = (),
        piece: int = 1,
        speculation: MethodChoice | None = None,
    ) -> AsyncGenerator[TokenDelta]: ...


@dataclass(frozen=True)
class TextDelta:
    """Some of the answer, final."""

    text: str
    token_ids: tuple[int, ...]
    origin: Origin
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Verification:
    """What was made of a draft, or of a window of one: the first `kept` of its tokens stand."""

    start: int  # tokens of the answer before it
    draft_token_ids: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
    p_correct: tuple[float | None, ...]
    accepted_prefix_length: int
    rejected_text: str  # the text of the rest


StageName = Literal["warm", "draft", "judge", "write"]


@dataclass(frozen=True)
class Stage:
    """When something was done for an answer, in seconds since it was begun."""

    name: StageName
    start: float
    end: float


@dataclass(frozen=True)
class Fallback:
    """Why the target answered alone after all."""

    cause: FallbackCause
    message: str


@dataclass(frozen=True)
class Usage:
    """What an answer took."""

    mode: Mode
    draft_tokens: int = 0
    accepted_tokens: int = 0
    target_tokens: int = 0  # by the target
    rounds: int = 0
    accepted_prefix_length: int | None = None  # tokens of the first draft that were kept
    cached_tokens: int = 0  # tokens of the prompt that the target knew before
    stages: tuple[Stage, ...] = ()
    ttft_s: float = 0.0  # until the first of the answer
    total_s: float = 0.0
    fallback: Fallback | None = None
    speculation: SpeculationStats | None = None  # while the target wrote

    @property
    def rejected_tokens(self) -> int:
        return self.draft_tokens - self.accepted_tokens

    @property
    def decoded_tokens(self) -> int:
        """Tokens that came of the target's passes: in mode exact those of the draft as well."""
        return self.target_tokens + (self.accepted_tokens if self.mode == "exact" else 0)

    def seconds(self, *names: StageName) -> float:
        return sum(stage.end - stage.start for stage in self.stages if stage.name in names)


@dataclass(frozen=True)
class Finished:
    finish_reason: FinishReason
    usage: Usage


Event = TextDelta | Verification | Finished
