"""From a finished answer to the figures it adds to."""

from collections.abc import Sequence

from deployments.api.responses import Answer
from deployments.observability import metrics
from deployments.observability.metrics import POSITIONS, Meters, VerdictKind
from parse.protocol import Usage, Verification

OPEN_END = len(POSITIONS) - 1  # positions beyond that share the last name


def tally(meters: Meters, answer: Answer) -> None:
    usage, finish = answer.ended.usage, answer.ended.finish_reason
    mode = usage.mode
    meters.add(metrics.ANSWERS, mode=mode, finish=finish)
    meters.add(metrics.VERDICTS, mode=mode, verdict=_verdict(usage))
    meters.add(metrics.PROMPT_TOKENS, answer.prompt_tokens)
    meters.add(metrics.CACHED_TOKENS, usage.cached_tokens)
    meters.add(metrics.DRAFTED, usage.draft_tokens, mode=mode)
    meters.add(metrics.ACCEPTED, usage.accepted_tokens, mode=mode)
    meters.add(metrics.REJECTED, usage.rejected_tokens, mode=mode)
    meters.add(metrics.WRITTEN, usage.target_tokens, mode=mode)
    meters.add(metrics.ROUNDS, usage.rounds, mode=mode)
    if usage.draft_tokens:
        meters.observe(metrics.ACCEPTED_SHARE, usage.accepted_tokens / usage.draft_tokens, mode=mode)
    if usage.accepted_prefix_length is not None:
        meters.observe(metrics.BOUNDARY, usage.accepted_prefix_length, mode=mode)
    if usage.fallback is not None:
        meters.add(metrics.FALLBACKS, cause=usage.fallback.cause)
    if mode == "exact":  # the rule takes tokens of the draft up to the first that differs
        _proposed(meters, "draft", [1] * usage.draft_tokens, [1] * usage.accepted_tokens)
    if speculated := usage.speculation:
        meters.add(metrics.PASSES, speculated.passes, method=speculated.method)
        meters.add(metrics.PASSED, usage.decoded_tokens, method=speculated.method)
        _proposed(meters, speculated.method, speculated.proposed_per_position, speculated.accepted_per_position)
    for verdict in answer.verdicts:
        _chances(meters, verdict)
    _times(meters, answer)


def _verdict(usage: Usage) -> VerdictKind:
    if not usage.draft_tokens:
        return "skipped"
    if not usage.accepted_tokens:
        return "none"
    return "partial" if usage.rejected_tokens else "whole"


def _proposed(meters: Meters, method: str, proposed: Sequence[int], accepted: Sequence[int]) -> None:
    """Tokens at each place of the proposals."""
    for metric, counts in ((metrics.PROPOSED, proposed), (metrics.PROPOSED_ACCEPTED, accepted)):
        for position, count in zip(POSITIONS, (*counts[:OPEN_END], sum(counts[OPEN_END:])), strict=False):
            meters.add(metric, count, method=method, position=position)


def _chances(meters: Meters, verdict: Verification) -> None:
    for cut, chance in zip(verdict.prefix_lengths, verdict.p_correct, strict=True):
        if chance is not None:
            kept = cut <= verdict.accepted_prefix_length
            meters.observe(metrics.CORRECT, chance, kept="yes" if kept else "no")


def _times(meters: Meters, answer: Answer) -> None:
    usage = answer.ended.usage
    mode = usage.mode
    stages = [("queue", answer.waited_s), *((stage.name, stage.end - stage.start) for stage in usage.stages)]
    for name, seconds in stages:
        meters.observe(metrics.STAGE, seconds, stage=name, mode=mode)
        meters.add(metrics.SPENT, seconds, on=name, mode=mode)
    whole = answer.waited_s + usage.total_s
    meters.observe(metrics.ANSWER, whole, mode=mode)
    meters.add(metrics.SPENT, whole, on="answer", mode=mode)
    meters.observe(metrics.FIRST_TOKEN, answer.waited_s + usage.ttft_s, mode=mode)
    for gap in answer.gaps:
        meters.observe(metrics.BETWEEN_TOKENS, gap, mode=mode)
