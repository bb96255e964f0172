"""The values that travel between callers, pipeline and engine, and the errors they meet."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import zip_longest
from typing import Literal

from parse.errors import (
    DraftUnavailable as DraftUnavailable,
)
from parse.errors import (
    EngineStopped as EngineStopped,
)
from parse.errors import (
    FallbackCause as FallbackCause,
)
from parse.errors import (
    NumericalError as NumericalError,
)
from parse.errors import (
    RequestCancelled as RequestCancelled,
)
from parse.errors import (
    RequestError as RequestError,
)
from parse.errors import (
    VerificationError as VerificationError,
)


def validate_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """The same as plain integers, each of them a token."""
    try:
        integers = [operator.index(token) for token in token_ids]
    except TypeError as error:
        raise RequestError(field, f"must hold token ids, whole numbers: {error}") from error
    if integers and not (min(integers) >= 0 and max(integers) < vocab_size):
        raise RequestError(field, f"token ids must lie in 0..{vocab_size - 1}")
    return integers


MAX_LOGPROBS = 20
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256  # strings, characters


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. The defaults are plain sampling; `temperature=0` is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    max_tokens: int | None = None  # None: up to the context's limit
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # of the chosen token, and of that many others

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_range("top_k", self.top_k, 0, None, whole=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias", f"must map token ids to numbers, got {self.logit_bias!r}")
        for token, bias in self.logit_bias.items():
            _check_range("logit_bias", token, 0, None, whole=True)
            _check_range("logit_bias", bias, -100.0, 100.0)
        _check_range("seed", self.seed, None, None, whole=True)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, None, whole=True)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS, whole=True)
        if not isinstance(self.stop, list | tuple) or not all(isinstance(text, str) for text in self.stop):
            raise RequestError("stop", f"must be a list of strings, got {self.stop!r}")
        if not all(self.stop):
            raise RequestError("stop", "a stop string must not be empty")
        if len(self.stop) > MAX_STOP_STRINGS or any(len(text) > MAX_STOP_LENGTH for text in self.stop):
            raise RequestError("stop", f"takes at most {MAX_STOP_STRINGS} strings of {MAX_STOP_LENGTH} characters")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def modifies_logits(self) -> bool:
        """Do the logits change before a token is chosen?"""
        return bool(
            self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )


def _check_range(
    name: str, value: object, low: float | None, high: float | None, *, above: bool = False, whole: bool = False
) -> None:
    """NaN fails every comparison, so it is refused too."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise RequestError(name, f"must be a {'whole ' if whole else ''}number, got {value!r}")
    if (low is not None and not (low < value if above else low <= value)) or (high is not None and not value <= high):
        bounds = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high is not None else "")
        raise RequestError(name, f"must be {bounds}, got {value}")


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of the token that was taken, with the likeliest ones beside it."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


NO_STREAMING = 1 << 30
"""A stream interval so long that everything comes in one delta."""

FinishReason = Literal["stop", "length"]

MethodName = str
MethodChoice = str


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What came of a method's proposals."""

    method: MethodName
    passes: int = 0  # of the target, with proposals and without, each of which wrote at least a token
    proposed_per_position: tuple[int, ...] = ()  # tokens, at each place of the proposals
    accepted_per_position: tuple[int, ...] = ()  # of them; both are as long as the longest proposal

    def __add__(self, other: "SpeculationStats") -> "SpeculationStats":
        def added(one: tuple[int, ...], two: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(a + b for a, b in zip_longest(one, two, fillvalue=0))

        return SpeculationStats(
            other.method,
            self.passes + other.passes,
            added(self.proposed_per_position, other.proposed_per_position),
            added(self.accepted_per_position, other.accepted_per_position),
        )


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """A piece of what is being written."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: FinishReason | None = None  # set on the last piece: ended by itself or at a stop string, or cut off
    num_accepted: int = 0  # how many of these the proposal held already
    num_cached_tokens: int = 0  # on the first piece: tokens of what it goes on from that were known
    speculation: SpeculationStats | None = None  # in the passes that wrote these


def merge_deltas(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """As if they had come in one."""
    if len(deltas) == 1:
        return deltas[0]
    return TokenDelta(
        tuple(token for piece in deltas for token in piece.token_ids),
        tuple(logprob for piece in deltas for logprob in piece.logprobs),
        deltas[-1].finish_reason,
        sum(piece.num_accepted for piece in deltas),
        deltas[0].num_cached_tokens,
        sum_stats(piece.speculation for piece in deltas),
    )


def sum_stats(parts: Iterable[SpeculationStats | None]) -> SpeculationStats | None:
    """All that there is, None if nothing is."""
    present = [part for part in parts if part is not None]
    return reduce(SpeculationStats.__add__, present) if present else None


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What the target makes of a draft."""

    p_correct: tuple[float | None, ...]  # P(correct) at each cut; None where it no longer mattered
    logprobs: tuple[Logprob, ...] = ()  # the target's own, of the draft's tokens, where asked for
    num_cached_tokens: int = 0  # tokens of prompt and draft that were known
