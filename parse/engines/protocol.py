"""The interface between the pipeline and an engine.

It consists of two protocols and the capabilities of the engine.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from parse.errors import RequestError
from parse.requests import (
    DraftRequest,
    GenerateRequest,
    GenerationRequest,
    VerifyAndGenerateRequest,
    VerifyRequest,
)
from parse.types import SamplingParams, TokenDelta, VerifyResult


class Drafter(Protocol):
    def draft(self, request: DraftRequest) -> AsyncGenerator[TokenDelta]:
        """Continues the request's output, in the target's tokens."""
        ...


class Verifier(Protocol):
    async def prefill(self, prompt_token_ids: Sequence[int]) -> int:
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

    def check(self, request: GenerationRequest) -> None:
        """Raises RequestError if the request needs a capability that the engine lacks."""
        if request.mode != "auto" and request.mode not in self.modes:
            raise RequestError("mode", f"this engine supports {_listed(self.modes)}, got {request.mode!r}")
        method = request.speculative_method
        if method not in (None, "none", *self.speculative_methods):
            offered = _listed(("none", *self.speculative_methods))
            raise RequestError("speculation", f"must be one of {offered}, got {method!r}")
        params, defaults = request.sampling_params, SamplingParams()
        for field in fields(SamplingParams):
            changed = getattr(params, field.name) != getattr(defaults, field.name)
            if changed and field.name not in self.sampling_params:
                raise RequestError(field.name, "is not supported by this engine")
        if params.logprobs is not None and params.logprobs > self.max_logprobs:
            raise RequestError("logprobs", f"this engine returns at most {self.max_logprobs}, got {params.logprobs}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
