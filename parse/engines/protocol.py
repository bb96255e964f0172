"""The interface between the pipeline and an engine.

It consists of two protocols and the capabilities of the engine.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from parse.errors import RequestError
from parse.requests import (
    DraftRequest,
    GenerateRequest,
    GenerationRequest,
    VerifyAndGenerateRequest,
    VerifyRequest,
)
from parse.types import SamplingParams, TokenDelta, VerifyResult


@dataclass(frozen=True)
class EngineStats:
    """The current state of the engine, and counters since its start. None is what an engine does not count."""

    num_running: int = 0
    num_waiting: int = 0
    num_steps: int = 0
    num_step_requests: int | None = None
    """Requests of all steps. Divided by the number of steps, this is the mean batch size."""
    busy_s: float | None = None  # seconds spent in these steps
    num_tokens: int = 0  # tokens computed in these steps
    prefix_queries: int = 0  # tokens that were looked up in the prefix cache
    prefix_hits: int = 0  # tokens that were found there
    evictions: int | None = None  # of cached sequences
    blocks_used: int = 0
    blocks_cached: int = 0  # the used blocks that no running request holds
    blocks_total: int = 0
    num_replayed_steps: int = 0  # how many of the steps were replayed CUDA graphs
    num_proposed_tokens: int = 0
    """Tokens proposed by the method of a server, which does not report them with each answer."""
    num_accepted_tokens: int = 0  # those of them that became part of answers
    servers_responding: int = 0  # servers that run the model for a remote engine
    servers_failing: int = 0
    num_server_restarts: int = 0
    """How often the engine has started its own server again."""
    server_metrics: str = ""
    """The metrics that the engine's own server exports, in the text format of Prometheus."""


class Drafter(Protocol):
    def draft(self, request: DraftRequest) -> AsyncGenerator[TokenDelta]:
        """Continues the request's output, in the target's tokens."""
        ...


class Verifier(Protocol):
    async def prefill(self, prompt_token_ids: Sequence[int], session_key: str = "") -> int:
        """Computes a prompt ahead of time.

        Returns how many of its tokens were already cached.
        """
        ...

    async def verify(self, request: VerifyRequest) -> VerifyResult: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]: ...

    def verify_and_generate(self, request: VerifyAndGenerateRequest) -> AsyncGenerator[VerifyResult | TokenDelta]:
        """Yields the result of the verification, then the generated tokens.

        The result is yielded as soon as it is known.
        """
        ...


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do.

    A request for anything else is rejected with the name of the field.
    """

    modes: tuple[str, ...]
    speculative_methods: tuple[str, ...]
    """The first one is the default for requests that do not choose a method."""
    sampling_params: frozenset[str]
    """Names of fields of `SamplingParams` that may differ from their defaults."""
    max_logprobs: int
    max_model_len: int
    """The maximum number of tokens of prompt and answer together."""
    block_size: int
    """Tokens per block of the KV cache, the unit in which prefixes are shared."""
    eos_token_ids: frozenset[int] = frozenset()
    """The tokens that end an answer. If this is empty, the end token of the target's tokenizer is used."""

    continues_with_penalties: bool = True
    """Whether `presence_penalty` and `frequency_penalty` count the tokens of an answer that the engine continues."""
    exact_sampling: Literal["any", "unmodified", "greedy"] = "any"
    """The sampling with which mode `exact` can use a draft.

    "unmodified" means greedy decoding, or temperature 1 and no parameter that changes logits or excludes tokens."""
    prefill_interval: int | None = None
    """The number of draft tokens after which a draft is prefilled again while it is written. None means never."""
    stride: int | None = None
    """The distance between verified prefixes that takes the least time, or None if it was not measured."""
    returns_prompt_logprobs: bool = True
    """Whether it can return the log-probabilities of given tokens."""
    always_speculates: bool = False
    """Whether each answer is generated with a method that the server chooses, so that requests cannot choose one."""

    @property
    def method_choices(self) -> tuple[str, ...]:
        """What a request can choose as its speculative method."""
        return () if self.always_speculates else (*self.speculative_methods, "none")

    @property
    def default_method(self) -> str | None:
        """The choice that requests without one get, or None if there is no choice."""
        return next(iter(self.method_choices), None)

    def draft_obstacle(self, mode: str, params: SamplingParams) -> str | None:
        """Returns why the engine cannot use a draft in this mode, with these sampling parameters, or None if it can."""
        if not self.continues_with_penalties and (params.presence_penalty or params.frequency_penalty):
            return "the engine of the target applies penalties only to tokens that it generates itself"
        if mode == "exact" and self.exact_sampling != "any":
            truncated = params.top_p < 1 or params.top_k or params.min_p
            plain = self.exact_sampling == "unmodified" and params.temperature == 1 and not truncated
            if params.modifies_logits or not (params.greedy or plain):
                return (
                    "in mode exact, the engine of the target uses drafts only with temperature 0"
                    + (" or 1" if self.exact_sampling == "unmodified" else "")
                    + ", and without penalties, logit_bias, min_tokens, top_p, top_k and min_p"
                )
        return None

    def check(self, request: GenerationRequest) -> None:
        """Raises RequestError if the request needs a capability that the engine lacks."""
        if request.mode != "auto" and request.mode not in self.modes:
            raise RequestError("mode", f"this engine supports {_listed(self.modes)}, got {request.mode!r}")
        method = request.speculative_method
        if method is not None and self.always_speculates:
            raise RequestError("speculation", f"the server of the target chooses the method itself, got {method!r}")
        if method is not None and method not in self.method_choices:
            raise RequestError("speculation", f"must be one of {_listed(self.method_choices)}, got {method!r}")
        params, defaults = request.sampling_params, SamplingParams()
        for field in fields(SamplingParams):
            changed = getattr(params, field.name) != getattr(defaults, field.name)
            if changed and field.name not in self.sampling_params:
                raise RequestError(field.name, "is not supported by this engine")
        for num_logprobs in (params.logprobs, request.num_prompt_logprobs):
            if num_logprobs is not None and num_logprobs > self.max_logprobs:
                raise RequestError("logprobs", f"this engine returns at most {self.max_logprobs}, got {num_logprobs}")
        if request.num_prompt_logprobs is not None and not self.returns_prompt_logprobs:
            raise RequestError("logprobs", "this engine does not return those of the prompt")


class Engine(Verifier, Protocol):
    """Runs one model. It verifies and generates for the pipeline, and a drafter writes drafts with it."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str:
        """Where the model runs."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def capabilities(self) -> Capabilities: ...

    async def warm_up(self) -> None:
        """Prepares the engine, so that the first client does not wait longer than others."""
        ...

    async def read_stats(self) -> EngineStats: ...

    def check_health(self) -> None:
        """Raises RuntimeError if the engine cannot recover and has to be replaced."""
        ...

    async def check_available(self) -> None:
        """Raises RuntimeError if the engine cannot serve requests at the moment."""
        ...

    def shutdown(self) -> None:
        """Ends the engine. Calls in progress raise EngineStopped."""
        ...


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
