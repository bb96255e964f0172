"""The objects of one request in a mode, and the steps that modes consist of."""

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from parse.acceptance import AcceptancePolicy
from parse.config import VerificationSettings
from parse.engines.protocol import Drafter, Verifier
from parse.errors import VerificationError
from parse.events import Verification
from parse.modes.state import GenerationState
from parse.prefixes import prefix_lengths_at, prefix_lengths_every
from parse.prompts import VerificationSuffix
from parse.requests import GenerateRequest, GenerationRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.types import SamplingParams, VerifyResult


@dataclass(frozen=True, kw_only=True)
class Run:
    """The objects that the steps of one request share."""

    request: GenerationRequest
    sampling_params: SamplingParams
    """The request's parameters, with `max_tokens` lowered to what the context length allows."""
    state: GenerationState
    verifier: Verifier
    drafter: Drafter | None
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    """The tokens that end an answer of the target."""
    suffix: VerificationSuffix
    policy: AcceptancePolicy
    settings: VerificationSettings
    prefill_while_drafting: bool
    stride: int
    """The number of tokens between verified prefixes."""
    prefill_interval: int | None = None
    """The number of new draft tokens after which the draft is prefilled as well. None means that it is not."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def prefix_lengths(self, draft_token_ids: Sequence[int], *, complete: bool) -> list[int]:
        settings = self.settings
        if settings.prefix_boundaries == ("tokens",):
            return prefix_lengths_every(self.stride, len(draft_token_ids), complete=complete)
        texts = [self.decode([token]) for token in draft_token_ids]
        return prefix_lengths_at(settings.prefix_boundaries, texts, stride=self.stride, complete=complete)


async def prefill(run: Run) -> None:
    """Prefills the prompt if this is enabled and nothing has been generated yet."""
    if run.prefill_while_drafting and not run.state.output:
        with run.state.stage("warm"):
            run.state.record_cached(await run.verifier.prefill(run.request.prompt_token_ids, run.request.session_key))


async def prefill_draft(run: Run, draft_token_ids: Sequence[int]) -> None:
    """Prefills the beginning of a draft, so that its verification computes only what follows."""
    with run.state.stage("warm"):
        tokens = [*run.request.prompt_token_ids, *run.state.output, *draft_token_ids]
        await run.verifier.prefill(tokens, run.request.session_key)


async def generate(run: Run, draft_token_ids: Sequence[int] = ()) -> None:
    """Generates the rest of the answer.

    Draft tokens are accepted as long as the target chooses the same ones.
    """
    state = run.state
    deltas = run.verifier.generate(_generate_request(run, state.output, draft_token_ids))
    num_cached_tokens = 0
    with state.stage("write"):
        async with aclosing(deltas):
            async for delta in deltas:
                state.append(delta)
                state.finish_reason = delta.finish_reason
                num_cached_tokens = max(num_cached_tokens, delta.num_cached_tokens)
    state.record_cached(num_cached_tokens)


@dataclass(frozen=True, kw_only=True)
class DraftWindow:
    """The part of a draft that one call verifies."""

    token_ids: Sequence[int]
    """The tokens from the start of the draft to the end of the window."""
    prefix_lengths: Sequence[int]
    complete: bool
    """Whether the window ends with the end of a complete draft."""
    final_text: str | None = None
    """The text of the whole output if the draft is accepted and a stop string cuts the text of its last token."""
    num_accepted: int = 0
    """The number of draft tokens that are already in the output."""


async def verify_and_generate(
    run: Run,
    window: DraftWindow,
    *,
    generate_after_acceptance: bool = True,
    max_continuation_tokens: int | None = None,
    on_verified: Callable[[int], None] = lambda accepted_prefix_length: None,
) -> int:
    """Verifies a draft and generates what follows its accepted prefix.

    Returns the length of that prefix.
    """
    state = run.state
    output_before = tuple(state.output[: len(state.output) - window.num_accepted])
    request = VerifyAndGenerateRequest(
        verify=VerifyRequest(
            prompt_token_ids=run.request.prompt_token_ids,
            output_token_ids=output_before,
            draft_token_ids=tuple(window.token_ids),
            draft_complete=window.complete,
            prefix_lengths=tuple(window.prefix_lengths),
            suffix=run.suffix,
            policy=run.policy,
            num_logprobs=run.sampling_params.logprobs,
            session_key=run.request.session_key,
        ),
        sampling_params=run.sampling_params,
        stream_interval=run.request.stream_interval,
        speculative_method=run.request.speculative_method,
        num_accepted=window.num_accepted,
        generate_after_acceptance=generate_after_acceptance,
        max_continuation_tokens=max_continuation_tokens,
    )
    async with aclosing(run.verifier.verify_and_generate(request)) as items:
        with state.stage("judge"):
            result = await anext(items, None)
        if not isinstance(result, VerifyResult):
            raise VerificationError("the verifier did not return the result of the verification")
        _check_result(result, request.verify)
        accepted = request.accepted_prefix_length(result)
        _accept(run, request, result, accepted, window.final_text)
        on_verified(accepted)
        continuation = request.continuation(accepted)
        if continuation is None:
            return accepted
        limit_is_final = continuation.sampling_params.max_tokens == run.sampling_params.max_tokens
        with state.stage("write"):
            async for delta in items:
                assert not isinstance(delta, VerifyResult)
                state.append(delta)
                if delta.finish_reason != "length" or limit_is_final:
                    state.finish_reason = delta.finish_reason
    return accepted


def _generate_request(
    run: Run, output_token_ids: Sequence[int], draft_token_ids: Sequence[int] = ()
) -> GenerateRequest:
    return GenerateRequest(
        prompt_token_ids=run.request.prompt_token_ids,
        output_token_ids=tuple(output_token_ids),
        sampling_params=run.sampling_params,
        draft_token_ids=tuple(draft_token_ids),
        stream_interval=run.request.stream_interval,
        speculative_method=run.request.speculative_method,
        session_key=run.request.session_key,
    )


def _accept(
    run: Run, request: VerifyAndGenerateRequest, result: VerifyResult, accepted: int, final_text: str | None
) -> None:
    """Adds the accepted prefix to the output, and reports the verification."""
    state, verify, start = run.state, request.verify, request.num_accepted
    draft, max_tokens = tuple(verify.draft_token_ids), run.sampling_params.max_tokens
    state.record_cached(result.num_cached_tokens)
    state.record_answer_mass(result.answer_mass, run.policy.min_answer_mass)
    state.accepted_tokens += accepted - start
    if verify.draft_complete and accepted == len(draft):
        state.finish_reason = "stop"
    elif max_tokens is not None and len(verify.output_token_ids) + accepted >= max_tokens:
        state.finish_reason = "length"
    final = state.finish_reason == "stop"
    state.emit(draft[start:accepted], "draft", result.logprobs[start:accepted], final=final, final_text=final_text)
    state.events.put_nowait(
        Verification(
            start=len(verify.output_token_ids) + start,
            draft_token_ids=draft[start:],
            prefix_lengths=tuple(length - start for length in verify.prefix_lengths),
            p_correct=result.p_correct,
            answer_mass=result.answer_mass,
            accepted_prefix_length=accepted - start,
            rejected_text="" if final else run.decode(draft[accepted:]),
        )
    )


def _check_result(result: VerifyResult, request: VerifyRequest) -> None:
    """Raises VerificationError if a result is malformed.

    Without this check, such a result might cause a draft to be accepted by accident.
    """
    expected = len(request.prefix_lengths)
    if len(result.p_correct) != expected:
        raise VerificationError(f"the verifier evaluated {len(result.p_correct)} prefixes instead of {expected}")
    if len(result.answer_mass) not in (0, expected):
        raise VerificationError(f"the verifier returned {len(result.answer_mass)} answer masses instead of {expected}")
    if not all(probability is None or 0.0 <= probability <= 1.0 for probability in result.p_correct):
        raise VerificationError(f"the verifier returned values that are not probabilities: {result.p_correct}")
    if request.num_logprobs is not None and request.prefix_lengths:
        expected = request.prefix_lengths[-1]
        if len(result.logprobs) < expected:
            raise VerificationError(f"the verifier returned {len(result.logprobs)} logprobs for {expected} tokens")
