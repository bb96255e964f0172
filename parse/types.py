"""The values that travel between callers, pipeline and engine, and the errors they meet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


class RequestError(ValueError):
    """A request that cannot be served as it stands: names the field at fault and its limit."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class NumericalError(RuntimeError):
    """The model returned logits that are not numbers."""


class Cancelled(RuntimeError):
    """The caller gave the request up."""


class EngineStopped(RuntimeError):
    """The engine was shut down, or died, before the request was done."""


MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Sampling:
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
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, above=True)
        _within("top_k", self.top_k, 0, None)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, None, above=True)
        for bias in self.logit_bias.values():
            _within("logit_bias", bias, -100.0, 100.0)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, None)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not all(self.stop):
            raise RequestError("stop", "a stop string must not be empty")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def adjusts(self) -> bool:
        """Do the logits change before a token is chosen?"""
        return bool(
            self.logit_bias or self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )


def _within(name: str, value: float, low: float, high: float | None, *, above: bool = False) -> None:
    """NaN fails every comparison, so it is refused too."""
    if not (low < value if above else low <= value) or (high is not None and not value <= high):
        bounds = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high is not None else "")
        raise RequestError(name, f"must be {bounds}, got {value}")


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of the token that was taken, with the likeliest ones beside it."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A piece of what is being written."""

    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    finish: Finish | None = None  # set on the last piece: ended by itself or at a stop string, or cut off
    accepted: int = 0  # how many of these the proposal held already


@dataclass(frozen=True, slots=True)
class Judged:
    """What the target makes of a draft."""

    correct: tuple[float | None, ...]  # P(correct) at each cut; None where it no longer mattered
    logprobs: tuple[Logprob, ...] = ()  # the target's own, of the draft's tokens, where asked for
