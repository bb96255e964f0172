"""The requests to the pipeline, and from the pipeline to an engine.

An engine receives the same request objects from the pipeline, whether it runs in this process or in another one.

No request depends on an earlier one. Each contains all the tokens that it continues. If a call is lost with its
replica, it can therefore be repeated on any other replica. A prefix cache makes the repetition cheap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from parse.acceptance import AcceptancePolicy, Thresholds, accepted_prefix_length
from parse.errors import RequestError
from parse.prompts import Message, VerificationSuffix
from parse.reasoning import ReasoningState
from parse.registry import METHODS, MODES
from parse.types import MAX_LOGPROBS, NO_STREAMING, SamplingParams, VerifyResult, check_range

NUM_SESSION_TOKENS = 64


def session_key(prompt_token_ids: Sequence[int]) -> str:
    """Returns a key for prompts of which nothing but the tokens is known. The first of them decide."""
    return blake2b(repr(list(prompt_token_ids[:NUM_SESSION_TOKENS])).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class GenerationRequest:
    """A request from a client to the pipeline."""

    prompt_token_ids: Sequence[int]
    """The prompt in the target's tokens. For a chat, it ends with the assistant header."""
    messages: Sequence[Message] = ()
    """The same conversation, for a drafter that has its own chat template."""
    sampling_params: SamplingParams = SamplingParams()
    mode: str = "auto"
    thresholds: Thresholds | None = None
    prediction: Sequence[int] | None = None
    """A draft supplied by the client, in the target's tokens."""
    num_prompt_logprobs: int | None = None
    """Also return the log-probability of each token of the prompt, with this many alternatives."""
    stream_interval: int = 1
    """The number of tokens that the target generates between two deltas. Larger values are cheaper."""
    speculative_method: str | None = None
    """The token-level method with which the target generates, or "none". None selects the engine's default."""
    reasoning: ReasoningState | None = None
    """How the answer begins. None means that its text is not separated into reasoning and answer."""
    session_key: str = ""
    """Requests with the same key, such as the turns of a conversation, are best served where the earlier ones were.

    With "", the beginning of the prompt is the key."""

    def __post_init__(self) -> None:
        if self.num_prompt_logprobs is not None:
            check_range("prompt_logprobs", self.num_prompt_logprobs, 0, MAX_LOGPROBS, integer=True)
        if self.mode not in MODES:
            raise RequestError("mode", f"must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.speculative_method not in (None, "none", *METHODS):
            choices = ", ".join((*METHODS, "none"))
            raise RequestError("speculation", f"must be one of {choices}, got {self.speculative_method!r}")


@dataclass(frozen=True, kw_only=True)
class DraftRequest:
    """Asks a drafter to write or continue an answer, in the target's tokens."""

    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int] = ()
    messages: Sequence[Message] = ()
    sampling_params: SamplingParams = SamplingParams()
    stream_interval: int = NO_STREAMING
    session_key: str = ""


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """Asks the target for P(correct) of several prefixes of a draft."""

    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int] = ()
    """The part of the answer before the draft."""
    draft_token_ids: Sequence[int]
    draft_complete: bool = False
    """Whether the draft is a complete answer. If so, the last prefix is that answer."""
    prefix_lengths: Sequence[int]
    """In ascending order. A length n stands for the first n tokens of the draft."""
    suffix: VerificationSuffix
    policy: AcceptancePolicy | None = AcceptancePolicy()
    """Prefixes that cannot change the result under this policy are not evaluated. If the policy is None, all prefixes
    are evaluated."""
    num_logprobs: int | None = None
    """Also return the log-probability of each draft token, with this many alternatives. Without prefixes, nothing is
    verified, and the log-probabilities of the whole draft are returned."""
    session_key: str = ""

    @property
    def num_computed_draft_tokens(self) -> int:
        """The number of draft tokens that the target computes."""
        scores_only = self.num_logprobs is not None and not self.prefix_lengths
        return len(self.draft_token_ids) if scores_only else max(self.prefix_lengths, default=0)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Asks the target to generate after `output_token_ids`."""

    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int] = ()
    sampling_params: SamplingParams = SamplingParams()
    draft_token_ids: Sequence[int] = ()
    """These tokens are accepted as long as the target chooses the same ones, so the output does not change."""
    stream_interval: int = 1
    speculative_method: str | None = None
    session_key: str = ""


def _with_max_tokens(params: SamplingParams, max_tokens: int | None) -> SamplingParams:
    """Returns the parameters with another limit. It may be lower than the minimum length, which then ends there too."""
    min_tokens = params.min_tokens if max_tokens is None else min(params.min_tokens, max_tokens)
    return replace(params, max_tokens=max_tokens, min_tokens=min_tokens)


@dataclass(frozen=True, kw_only=True)
class VerifyAndGenerateRequest:
    """Asks the target to verify a draft and to generate what follows, in one call.

    The generated tokens follow the accepted prefix of the draft.
    """

    verify: VerifyRequest
    sampling_params: SamplingParams = SamplingParams()
    stream_interval: int = 1
    speculative_method: str | None = None
    num_accepted: int = 0
    """The number of draft tokens that an earlier call accepted. They are always kept."""
    generate_after_acceptance: bool = True
    """Generate even if every prefix passes. False while the rest of the draft is still being written."""
    max_continuation_tokens: int | None = None
    """Generate at most this many tokens after the accepted prefix."""

    def __post_init__(self) -> None:
        verify = self.verify
        if verify.policy is None:
            raise RequestError("policy", "must be set, because it chooses the accepted prefix")
        if self.num_accepted and not 0 < self.num_accepted < min(verify.prefix_lengths, default=0):
            raise RequestError("num_accepted", f"must be less than every prefix length, got {self.num_accepted}")
        if verify.draft_complete and max(verify.prefix_lengths, default=0) != len(verify.draft_token_ids):
            raise RequestError("prefix_lengths", "must end with the length of a complete draft")

    def accepted_prefix_length(self, result: VerifyResult) -> int:
        """Returns the number of draft tokens to keep.

        It includes the tokens that earlier calls accepted. Only evaluated prefixes count: a search leaves out others
        before one that passes.
        """
        verify = self.verify
        assert verify.policy is not None
        evaluated = result.evaluated
        accepted = accepted_prefix_length(
            [verify.prefix_lengths[index] for index in evaluated],
            [result.p_correct[index] for index in evaluated],
            verify.policy,
            complete=verify.draft_complete and evaluated[-1:] == [len(verify.prefix_lengths) - 1],
        )
        return max(self.num_accepted, accepted)

    def continuation(self, num_accepted: int) -> GenerateRequest | None:
        """Returns the request for the rest of the answer after these draft tokens.

        Returns None if nothing remains to be generated.
        """
        verify, params = self.verify, self.sampling_params
        if verify.draft_complete and num_accepted == len(verify.draft_token_ids):
            return None
        all_pass = num_accepted >= max(verify.prefix_lengths, default=0)
        if all_pass and not self.generate_after_acceptance:
            return None
        output = (*verify.output_token_ids, *verify.draft_token_ids[:num_accepted])
        limits = [params.max_tokens]
        if self.max_continuation_tokens is not None:
            limits.append(len(output) + self.max_continuation_tokens)
        max_tokens = min((limit for limit in limits if limit is not None), default=None)
        if max_tokens is not None and len(output) >= max_tokens:
            return None
        return GenerateRequest(
            prompt_token_ids=verify.prompt_token_ids,
            output_token_ids=output,
            sampling_params=_with_max_tokens(params, max_tokens),
            stream_interval=self.stream_interval,
            speculative_method=self.speculative_method,
            session_key=verify.session_key,
        )
