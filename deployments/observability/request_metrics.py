"""Records the metrics of a completed answer."""

from collections.abc import Sequence

from deployments.observability import metrics
from deployments.observability.choice_state import ChoiceState
from deployments.observability.metrics import POSITIONS, DraftOutcome, MetricsRecorder
from parse.events import Usage, Verification

LAST_POSITION = len(POSITIONS) - 1  # all further positions share the last label


def record_choice_metrics(recorder: MetricsRecorder, choice: ChoiceState) -> None:
    usage, finish = choice.result.usage, choice.result.finish_reason
    mode = usage.mode
    recorder.add(metrics.ANSWERS, mode=mode, finish=finish)
    recorder.add(metrics.DRAFT_OUTCOMES, mode=mode, verdict=_draft_outcome(usage))
    recorder.add(metrics.PROMPT_TOKENS, choice.prompt_tokens)
    recorder.add(metrics.CACHED_TOKENS, usage.cached_tokens)
    recorder.add(metrics.DRAFT_TOKENS, usage.draft_tokens, mode=mode)
    recorder.add(metrics.ACCEPTED_TOKENS, usage.accepted_tokens, mode=mode)
    recorder.add(metrics.REJECTED_TOKENS, usage.rejected_tokens, mode=mode)
    recorder.add(metrics.TARGET_TOKENS, usage.target_tokens, mode=mode)
    recorder.add(metrics.VERIFICATION_ROUNDS, usage.rounds, mode=mode)
    if usage.draft_tokens:
        recorder.observe(metrics.ACCEPTED_SHARE, usage.accepted_tokens / usage.draft_tokens, mode=mode)
    if usage.accepted_prefix_length is not None:
        recorder.observe(metrics.ACCEPTED_PREFIX_LENGTH, usage.accepted_prefix_length, mode=mode)
    if usage.fallback is not None:
        recorder.add(metrics.FALLBACKS, cause=usage.fallback.cause)
    if mode == "exact":  # the draft is a proposal, which is accepted token by token up to the first difference
        _record_proposals(recorder, "draft", [1] * usage.draft_tokens, [1] * usage.accepted_tokens)
    if speculation := usage.speculation:
        method = speculation.method
        recorder.add(metrics.TARGET_PASSES, speculation.passes, method=method)
        recorder.add(metrics.TARGET_PASS_TOKENS, usage.decoded_tokens, method=method)
        _record_proposals(recorder, method, speculation.proposed_per_position, speculation.accepted_per_position)
    for verification in choice.verifications:
        _record_correct_probabilities(recorder, verification)
    _record_times(recorder, choice)


def _draft_outcome(usage: Usage) -> DraftOutcome:
    if not usage.draft_tokens:
        return "skipped"
    if not usage.accepted_tokens:
        return "none"
    return "partial" if usage.rejected_tokens else "whole"


def _record_proposals(recorder: MetricsRecorder, method: str, proposed: Sequence[int], accepted: Sequence[int]) -> None:
    """Records proposed and accepted tokens at each position of the proposals."""
    for metric, counts in ((metrics.PROPOSED_TOKENS, proposed), (metrics.ACCEPTED_PROPOSED_TOKENS, accepted)):
        for position, count in zip(POSITIONS, (*counts[:LAST_POSITION], sum(counts[LAST_POSITION:])), strict=False):
            recorder.add(metric, count, method=method, position=position)


def _record_correct_probabilities(recorder: MetricsRecorder, verification: Verification) -> None:
    for mass in verification.answer_mass:
        if mass is not None:
            recorder.observe(metrics.ANSWER_MASS, mass)
    for prefix_length, probability in zip(verification.prefix_lengths, verification.p_correct, strict=True):
        if probability is not None:
            is_accepted = prefix_length <= verification.accepted_prefix_length
            recorder.observe(metrics.CORRECT_PROBABILITY, probability, kept="yes" if is_accepted else "no")


def _record_times(recorder: MetricsRecorder, choice: ChoiceState) -> None:
    usage = choice.result.usage
    mode = usage.mode
    stages = [("queue", choice.queue_s), *((stage.name, stage.end - stage.start) for stage in usage.stages)]
    for name, seconds in stages:
        recorder.observe(metrics.STAGE_SECONDS, seconds, stage=name, mode=mode)
        recorder.add(metrics.SPENT_SECONDS, seconds, on=name, mode=mode)
    total_s = choice.queue_s + usage.total_s
    recorder.observe(metrics.ANSWER_SECONDS, total_s, mode=mode)
    recorder.add(metrics.SPENT_SECONDS, total_s, on="answer", mode=mode)
    recorder.observe(metrics.TIME_TO_FIRST_TOKEN, choice.queue_s + usage.ttft_s, mode=mode)
    for latency_s in choice.inter_token_s:
        recorder.observe(metrics.INTER_TOKEN_LATENCY, latency_s, mode=mode)
