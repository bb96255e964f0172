"""Builds the usage of a response, and the report on each of its choices."""

from collections.abc import Sequence

from deployments.api.response_models import (
    CompletionTokensDetails,
    CompletionUsage,
    ParseReport,
    PositionAcceptance,
    PromptTokensDetails,
    SpeculationReport,
    StageTimes,
    TracedTextDelta,
    TracedVerification,
)
from deployments.observability.choice_state import ChoiceState
from parse.events import TextDelta, Usage, Verification


def build_report(choice: ChoiceState, *, trace: bool) -> ParseReport:
    """Returns the report on a choice. `trace` adds its deltas and verifications."""
    usage = choice.result.usage
    stages = [StageTimes(name="queue", start=0.0, end=choice.queue_s)]
    stages += [
        StageTimes(name=stage.name, start=choice.queue_s + stage.start, end=choice.queue_s + stage.end)
        for stage in usage.stages
    ]
    return ParseReport(
        mode=usage.mode,
        drafted=usage.draft_tokens,
        accepted=usage.accepted_tokens,
        rejected=usage.rejected_tokens,
        written=usage.target_tokens,
        rounds=usage.rounds,
        boundary=usage.accepted_prefix_length,
        fallback=usage.fallback.message if usage.fallback else None,
        answer_mass=usage.answer_mass,
        cached=usage.cached_tokens,
        speculation=build_speculation_report(usage),
        retries=choice.session.num_retries,
        arrived=choice.arrival_time,
        first_s=choice.queue_s + usage.ttft_s,
        total_s=choice.queue_s + usage.total_s,
        stages=stages,
        pieces=[trace_text_delta(delta) for delta in choice.deltas] if trace else None,
        verdicts=[trace_verification(verification) for verification in choice.verifications] if trace else None,
    )


def trace_text_delta(delta: TextDelta) -> TracedTextDelta:
    return TracedTextDelta(text=delta.reasoning + delta.text, origin=delta.origin, tokens=len(delta.token_ids))


def aggregate_usage(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[int], usages: Sequence[Usage]
) -> CompletionUsage:
    """Returns the usage of all choices.

    A prompt that several choices share counts once, as in the OpenAI API.
    """
    prompt_tokens, completion_tokens = sum(prompt_lengths), sum(completion_lengths)
    choices_per_prompt = len(usages) // len(prompt_lengths)
    cached_tokens = (
        min(usage.cached_tokens for usage in usages[start : start + choices_per_prompt])
        for start in range(0, len(usages), choices_per_prompt)
    )
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached_tokens)),
        completion_tokens_details=CompletionTokensDetails(
            accepted_prediction_tokens=sum(usage.accepted_tokens for usage in usages),
            rejected_prediction_tokens=sum(usage.rejected_tokens for usage in usages),
        ),
    )


def build_speculation_report(usage: Usage) -> SpeculationReport | None:
    speculation = usage.speculation
    if speculation is None:
        return None
    positions = zip(speculation.proposed_per_position, speculation.accepted_per_position, strict=True)
    return SpeculationReport(
        method=speculation.method,
        passes=speculation.passes,
        tokens=usage.decoded_tokens,
        tokens_per_pass=usage.decoded_tokens / speculation.passes,
        proposed=sum(speculation.proposed_per_position),
        accepted=sum(speculation.accepted_per_position),
        places=[
            PositionAcceptance(proposed=proposed, accepted=accepted, share=accepted / proposed)
            for proposed, accepted in positions
        ],
    )


def trace_verification(verification: Verification) -> TracedVerification:
    return TracedVerification(
        start=verification.start,
        cuts=list(verification.prefix_lengths),
        correct=list(verification.p_correct),
        kept=verification.accepted_prefix_length,
        rejected=verification.rejected_text,
    )
