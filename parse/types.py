"""The values that travel between clients, pipeline and engines."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import zip_longest
from typing import Literal

from parse.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256  # strings, characters
MAX_STOP_TOKEN_IDS = 128

NO_STREAMING = 1 << 30
"""A stream interval that is so long that all tokens come in one delta."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen.

    By default they are sampled from the unchanged distribution. `temperature=0` is greedy.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    max_tokens: int | None = None
    """The maximum number of tokens of the whole output. None means as many as the context length allows. With 0,
    nothing is generated."""
    min_tokens: int = 0
    """The output does not end at an end token or a stop string before it has this many tokens."""
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output, in addition to the end tokens of the model."""
    include_stop_str_in_output: bool = False
    """Whether the stop string or the token of `stop_token_ids` that ends the output is a part of it."""
    include_eos_token: bool = False
    """Whether the end token of the model that ends the output is a part of it. As a special token, it has no text. A
    draft that is accepted as a whole has no end token, because the target does not generate one."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Return the log-probability of each token, with this many alternatives."""

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0, 2.0)
        check_range("top_p", self.top_p, 0.0, 1.0, exclusive=True)
        check_range("top_k", self.top_k, 0, None, integer=True)
        check_range("min_p", self.min_p, 0.0, 1.0)
        check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias", f"must map token ids to numbers, got {self.logit_bias!r}")
        for token, bias in self.logit_bias.items():
            check_range("logit_bias", token, 0, None, integer=True)
            check_range("logit_bias", bias, -100.0, 100.0)
        check_range("seed", self.seed, None, None, integer=True)
        for name in ("ignore_eos", "include_eos_token", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, f"must be True or False, got {getattr(self, name)!r}")
        check_range("min_tokens", self.min_tokens, 0, None, integer=True)
        if self.max_tokens is not None:
            check_range("max_tokens", self.max_tokens, 0, None, integer=True)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    "min_tokens", f"must be at most max_tokens, {self.max_tokens}, got {self.min_tokens}"
                )
        if not isinstance(self.stop_token_ids, list | tuple):
            raise RequestError("stop_token_ids", f"must be a list of token ids, got {self.stop_token_ids!r}")
        for token in self.stop_token_ids:
            check_range("stop_token_ids", token, 0, None, integer=True)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError("stop_token_ids", f"must be at most {MAX_STOP_TOKEN_IDS} tokens")
        if self.logprobs is not None:
            check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS, integer=True)
        if not isinstance(self.stop, list | tuple) or not all(isinstance(text, str) for text in self.stop):
            raise RequestError("stop", f"must be a list of strings, got {self.stop!r}")
        if not all(self.stop):
            raise RequestError("stop", "a stop string must not be empty")
        if len(self.stop) > MAX_STOP_STRINGS or any(len(text) > MAX_STOP_LENGTH for text in self.stop):
            raise RequestError(
                "stop", f"must be at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def modifies_logits(self) -> bool:
        """Whether a penalty, a bias or a minimum length changes the logits before a token is chosen."""
        return bool(
            self.logit_bias
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.min_tokens
        )

    def end_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """Returns the tokens that end the output of a model with these end tokens."""
        return frozenset(() if self.ignore_eos else eos_token_ids).union(self.stop_token_ids)

    def included_end_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """Returns the end tokens that are a part of the output."""
        stop_token_ids = frozenset(self.stop_token_ids)
        included = stop_token_ids if self.include_stop_str_in_output else frozenset()
        return included.union(frozenset(eos_token_ids) - stop_token_ids) if self.include_eos_token else included


def check_range(
    name: str, value: object, low: float | None, high: float | None, *, exclusive: bool = False, integer: bool = False
) -> None:
    """Raises RequestError for a value out of range.

    NaN fails every comparison, so it is rejected too.
    """
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
        raise RequestError(name, f"must be a {'whole ' if integer else ''}number, got {value!r}")
    too_low = low is not None and not (low < value if exclusive else low <= value)
    if too_low or (high is not None and not value <= high):
        bounds = f"{'above' if exclusive else 'at least'} {low}" + (f" and at most {high}" if high is not None else "")
        raise RequestError(name, f"must be {bounds}, got {value}")


def validate_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """Returns the ids as plain integers.

    Raises RequestError unless each of them is a token of the vocabulary.
    """
    try:
        integers = [operator.index(token) for token in token_ids]
    except TypeError as error:
        raise RequestError(field, f"must hold token ids, which are whole numbers: {error}") from error
    if integers and not (min(integers) >= 0 and max(integers) < vocab_size):
        raise RequestError(field, f"token ids must lie in 0..{vocab_size - 1}")
    return integers


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of a token, and the most likely tokens at its position."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """The numbers of proposed and accepted tokens of a token-level method."""

    method: str
    passes: int = 0
    """Forward passes of the target that generated tokens, with and without a proposal."""
    proposed_per_position: tuple[int, ...] = ()
    """Tokens proposed at each position of the proposals."""
    accepted_per_position: tuple[int, ...] = ()
    """The number of those tokens that were accepted. Both tuples are as long as the longest proposal."""

    def __add__(self, other: "SpeculationStats") -> "SpeculationStats":
        def added(one: tuple[int, ...], two: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(a + b for a, b in zip_longest(one, two, fillvalue=0))

        return SpeculationStats(
            other.method,
            self.passes + other.passes,
            added(self.proposed_per_position, other.proposed_per_position),
            added(self.accepted_per_position, other.accepted_per_position),
        )


def sum_stats(parts: Iterable[SpeculationStats | None]) -> SpeculationStats | None:
    """Returns the sum of the parts that are not None, or None if there are none."""
    present = [part for part in parts if part is not None]
    return reduce(SpeculationStats.__add__, present) if present else None


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """A part of what an engine generates."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: FinishReason | None = None
    """Set on the last delta: "stop" at an end token or stop string, "length" at a limit."""
    num_accepted: int = 0
    """The first `num_accepted` of these tokens were accepted from the request's draft."""
    num_cached_tokens: int = 0
    """Set on one delta, usually the first: the number of context tokens that were found in the prefix cache."""
    speculation: SpeculationStats | None = None
    """Statistics of the passes that generated these tokens."""


def merge_deltas(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """Merges consecutive deltas into one."""
    if len(deltas) == 1:
        return deltas[0]
    return TokenDelta(
        tuple(token for delta in deltas for token in delta.token_ids),
        tuple(logprob for delta in deltas for logprob in delta.logprobs),
        deltas[-1].finish_reason,
        sum(delta.num_accepted for delta in deltas),
        max(delta.num_cached_tokens for delta in deltas),
        sum_stats(delta.speculation for delta in deltas),
    )


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The target's assessment of a draft."""

    p_correct: tuple[float | None, ...]
    """P(correct) of each prefix. None if it could not change the result, if its suffix did not fit into the context, or
    if the answer words were too improbable."""
    logprobs: tuple[Logprob, ...] = ()
    """The target's own log-probabilities of the draft's tokens, if they were requested."""
    num_cached_tokens: int = 0
    """The number of tokens of prompt and draft that were found in the prefix cache."""
    answer_mass: tuple[float | None, ...] = ()
    """The probability of both answer words together, for each prefix that was evaluated. If it is small, the target
    would reply with something else, and P(correct) means nothing."""

    @property
    def evaluated(self) -> list[int]:
        """The indices of the prefixes that were evaluated, in ascending order. Without `answer_mass`, all of them."""
        return [index for index in range(len(self.p_correct)) if not self.answer_mass or self._is_evaluated(index)]

    def _is_evaluated(self, index: int) -> bool:
        return self.p_correct[index] is not None or self.answer_mass[index] is not None
