"""The calls that the engine makes to a server, whatever kind of server it is.

A dialect writes the requests and reads the responses of one kind. A response that does not match its request raises
ServerUnavailable, so that no draft is accepted because of a response that was misread.
"""

import math
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from parse.engines.protocol import EngineStats
from parse.engines.remote.errors import ServerUnavailable, WrongModel
from parse.engines.remote.transport import Transport
from parse.types import FinishReason, Logprob, SamplingParams

MAX_GAP = 0.1  # nats per token; other kernels and batches change log-probabilities by much less


@dataclass(frozen=True)
class Chunk:
    """A part of a stream of generated tokens."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: FinishReason | None
    num_cached_tokens: int


@dataclass(frozen=True)
class PromptLogprob:
    """What a server returns about a token of a prompt."""

    logprob: Logprob
    is_argmax: bool


@dataclass(frozen=True)
class ModelIdentity:
    """Tells whether two servers, or one server before and after a restart, serve the same model."""

    name: str
    root: str
    """Where the server loaded the model from."""
    max_model_len: int
    logprobs: tuple[float, ...]
    """Of the most likely token after some beginnings of a fixed text. Other weights give other values."""

    def check(self, other: "ModelIdentity") -> None:
        """Raises WrongModel if the other model is not this one."""
        if (self.root, self.max_model_len) != (other.root, other.max_model_len):
            raise WrongModel(
                f"it serves {other.root} with a context of {other.max_model_len} tokens instead of {self.root} with "
                f"{self.max_model_len}"
            )
        gap = sum(abs(one - two) for one, two in zip(self.logprobs, other.logprobs, strict=True)) / len(self.logprobs)
        if gap > MAX_GAP:
            raise WrongModel(f"it serves {other.root} with other weights than before")


@dataclass(frozen=True)
class ServerFeatures:
    """The calls of a server that work, and its settings that matter here."""

    version: str
    block_size: int
    verifies: bool
    """Whether it returns the log-probabilities of the answer words."""
    verifies_by_token_id: bool
    """Whether it returns those of any tokens, and not only of the most likely ones."""
    has_prompt_logprobs: bool
    has_speculation: bool
    """Whether it generates with a speculative method of its own."""
    missing: tuple[str, ...] = ()
    """What else it lacks, in words for the log."""


class Dialect(Protocol):
    """The calls of one kind of server, with token ids in and out."""

    @property
    def kind(self) -> str:
        """The name of the software, as its users write it."""
        ...

    @property
    def tested_versions(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """The oldest and the newest one, or None if no real server was tested."""
        ...

    @property
    def max_logprobs(self) -> int: ...

    @property
    def unsupported_sampling_params(self) -> frozenset[str]: ...

    @property
    def ignored_with_speculation(self) -> frozenset[str]:
        """Sampling parameters that have no effect if the server has a speculative method."""
        ...

    async def identify(self, server: Transport, name: str | None, tokenizer: PreTrainedTokenizerBase) -> ModelIdentity:
        """Raises WrongModel if the server serves no such model, or one with another tokenizer."""
        ...

    async def find_features(
        self, server: Transport, model: ModelIdentity, tokenizer: PreTrainedTokenizerBase
    ) -> ServerFeatures:
        """Tries the calls that some versions lack."""
        ...

    async def prefill(self, server: Transport, model: str, prompt: Sequence[int]) -> int:
        """Returns how many tokens were cached."""
        ...

    async def next_token_logprobs(
        self,
        server: Transport,
        model: str,
        prompts: Sequence[Sequence[int]],
        token_ids: Sequence[int],
        *,
        by_token_id: bool,
    ) -> list[Mapping[int, float]]:
        """Returns log-probabilities after each prompt: those `by_token_id`, or those of the most likely tokens."""
        ...

    async def prompt_logprobs(
        self, server: Transport, model: str, prompt: Sequence[int], start: int, num_logprobs: int
    ) -> list[PromptLogprob]:
        """Returns what the server says about the tokens of the prompt from `start` on."""
        ...

    def generate(
        self,
        server: Transport,
        model: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        position: int,
    ) -> AsyncGenerator[Chunk]:
        """Streams the tokens that follow. `position` is the number of tokens that have been generated before."""
        ...

    def counters(self, metrics: str) -> str:
        """Returns the lines of the metrics that only grow."""
        ...

    def read_stats(self, metrics_texts: Sequence[str]) -> EngineStats:
        """Returns what the metrics of one or several servers say about their engines."""
        ...


def ranked(by_token_id: Mapping[int, float], count: int) -> tuple[tuple[int, float], ...]:
    """Returns the most likely tokens."""
    tokens: Iterable[tuple[int, float]] = sorted(by_token_id.items(), key=lambda item: -item[1])
    return tuple(tokens)[:count]


def read_logprob(value: Any) -> float:
    """Returns a log-probability. vLLM sends -9999.0 for a probability of 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > 1e-3:
        raise unreadable(f"{value!r} is not a log-probability")
    return float(value)


def unreadable(reason: str) -> ServerUnavailable:
    return ServerUnavailable(f"the response is not as expected: {reason}", deterministic=True)
