"""The figures of the service.

Each function returns a PromQL query over a `View`.
"""

from cluster.prometheus.queries import View, or_zero, parenthesized, ratio, ratio_or_zero
from deployments.observability import metrics

VERIFIED_MODES = 'mode!~"exact|off"'  # modes that verify drafts
COMPARABLE_MODES = 'mode!="exact"'  # in mode exact, the same passes generate and accept tokens
FAILED_OUTCOMES = 'outcome=~"overloaded|unavailable|timeout|failed"'
SERVICE_OUTCOMES = 'outcome!~"invalid|unauthorized|left"'  # errors of clients are not failures of the service
INVOLUNTARY_CAUSES = 'cause!="does_not_pay"'  # does_not_pay is a decision of the service
DRAFT_PROPOSALS, METHOD_PROPOSALS = 'method="draft"', 'method!="draft"'  # the draft of mode exact; token-level methods
UNEXPECTED_LOSSES = 'cause!="stopped"'  # an engine rejects calls with this cause while its replica is replaced


def accepted_share(view: View, *conditions: str, by: tuple[str, ...] = ()) -> str:
    """Share of draft tokens that became part of answers."""
    return ratio_or_zero(
        view.rate(metrics.ACCEPTED_TOKENS, *conditions, by=by), view.rate(metrics.DRAFT_TOKENS, *conditions, by=by)
    )


def answer_tokens(view: View, condition: str = COMPARABLE_MODES, by: tuple[str, ...] = ()) -> str:
    """Answer tokens per second, from drafts and from the target."""
    conditions = (condition,) if condition else ()
    answers = view.count(metrics.ANSWER_SECONDS, *conditions, by=by)
    parts = (metrics.ACCEPTED_TOKENS, metrics.TARGET_TOKENS)
    return " + ".join(or_zero(view.rate(part, *conditions, by=by), answers) for part in parts)


def target_seconds_per_token(view: View) -> str:
    """Seconds that the target needs to generate one token."""
    everywhere = view.without("mode")  # the speed of the target does not depend on the selected modes
    return ratio(
        everywhere.rate(metrics.SPENT_SECONDS, 'on="write"', COMPARABLE_MODES),
        everywhere.rate(metrics.TARGET_TOKENS, COMPARABLE_MODES),
    )


def speed_up(view: View, condition: str = COMPARABLE_MODES, by: tuple[str, ...] = ()) -> str:
    """The time that the target alone would have needed, over the actual time.

    Both are for the same tokens. The actual time does not include queueing.
    """
    matching = f" on ({', '.join(view.by)}) group_left ()" if by else ""
    target_only = f"({answer_tokens(view, condition, by)}) *{matching} ({target_seconds_per_token(view)})"
    queued = view.rate(metrics.SPENT_SECONDS, 'on="queue"', condition, by=by)
    answer_s = view.rate(metrics.SPENT_SECONDS, 'on="answer"', condition, by=by)
    return f"{target_only} / ({answer_s} - {or_zero(queued, answer_s)} > 0)"


def failure_share(view: View) -> str:
    """Share of requests that failed because of the service.

    Requests that clients made fail are not included.
    """
    everywhere = view.without("mode")  # requests are counted by the requested mode, answers by the mode that was used
    return ratio_or_zero(
        everywhere.rate(metrics.REQUESTS, FAILED_OUTCOMES), everywhere.rate(metrics.REQUESTS, SERVICE_OUTCOMES)
    )


def truncated_share(view: View) -> str:
    """Share of answers that ended at a token limit."""
    return ratio_or_zero(view.rate(metrics.ANSWERS, 'finish="length"'), view.rate(metrics.ANSWERS))


def overlap_share(view: View) -> str:
    """Share of the time in which drafter and verifier worked at the same time.

    The whole is the time in which at least one of them worked.
    """
    drafter, verifier, both = (
        view.rate(metrics.BUSY_SECONDS, f'part="{part}"') for part in ("drafter", "verifier", "both")
    )
    either = f"{drafter} + {verifier} - {or_zero(both, verifier)}"
    return ratio(or_zero(both, verifier), f"({either})")


def waiting_ratio(view: View) -> str:
    """Waiting requests per slot."""
    return ratio(view.gauge(metrics.REQUESTS_WAITING), view.gauge(metrics.ANSWER_SLOTS))


def slots_in_use(view: View) -> str:
    return ratio(view.gauge(metrics.ANSWERS_RUNNING), view.gauge(metrics.ANSWER_SLOTS))


def fallback_share(view: View) -> str:
    """Share of answers without a draft because no drafter was available."""
    everywhere = view.without("mode")  # fallbacks are counted by their cause
    return ratio_or_zero(everywhere.rate(metrics.FALLBACKS, INVOLUNTARY_CAUSES), everywhere.rate(metrics.ANSWERS))


def audits(view: View) -> str:
    """Number of audited answers in the window."""
    return view.increase(metrics.AUDITS, 'result=~"agree|disagree"')


def disagreement_share(view: View) -> str:
    """Share of audits in which the target alone had a different result."""
    return ratio_or_zero(view.increase(metrics.AUDITS, 'result="disagree"'), audits(view))


def lost_calls(view: View) -> str:
    """Lost calls in the window. The value is zero while routers report no lost calls."""
    return or_zero(view.increase(metrics.RETRIES, UNEXPECTED_LOSSES), view.gauge(metrics.ANSWER_SLOTS))


def unreached_replicas(view: View) -> str:
    return or_zero(view.increase(metrics.UNREACHED_REPLICAS), view.gauge(metrics.ANSWER_SLOTS))


def trouble(view: View) -> str:
    return view.gauge(metrics.PART_UNAVAILABLE, by=("part",), operator="max")


def draft_outcome_share(view: View, outcome: str) -> str:
    """Share of the answers with a verified draft that have this outcome."""
    verified = view.rate(metrics.DRAFT_OUTCOMES, 'verdict!="skipped"')
    return ratio_or_zero(view.rate(metrics.DRAFT_OUTCOMES, f'verdict="{outcome}"'), verified)


def batch_size(view: View, by: tuple[str, ...] = ()) -> str:
    return ratio(view.rate(metrics.ENGINE_STEP_REQUESTS, by=by), view.rate(metrics.ENGINE_STEPS, by=by))


def busy_share(view: View, by: tuple[str, ...] = ()) -> str:
    """Mean share of their time that engines spend in forward passes."""
    return view.aggregated("avg", f"rate({view.series(metrics.ENGINE_BUSY_SECONDS)}[{view.window}])", by)


def cache_hit_share(view: View, by: tuple[str, ...] = ()) -> str:
    return ratio_or_zero(
        view.rate(metrics.ENGINE_PREFIX_CACHE_HITS, by=by), view.rate(metrics.ENGINE_PREFIX_CACHE_QUERIES, by=by)
    )


def kv_block_share(view: View, state: str, by: tuple[str, ...] = ()) -> str:
    """Share of an engine's KV cache blocks in this state."""
    return ratio(
        view.gauge(metrics.ENGINE_KV_CACHE_BLOCKS, f'state="{state}"', by=by),
        view.gauge(metrics.ENGINE_KV_CACHE_BLOCKS, by=by),
    )


def cached_prompt_share(view: View) -> str:
    return ratio_or_zero(view.rate(metrics.CACHED_TOKENS), view.rate(metrics.PROMPT_TOKENS))


def tokens_per_pass(view: View, by: tuple[str, ...] = ()) -> str:
    """Mean number of tokens of a forward pass with a token-level method."""
    return ratio(view.rate(metrics.TARGET_PASS_TOKENS, by=by), view.rate(metrics.TARGET_PASSES, by=by))


def proposals_accepted(view: View, *conditions: str, by: tuple[str, ...]) -> str:
    accepted = view.rate(metrics.ACCEPTED_PROPOSED_TOKENS, *conditions, by=by)
    return ratio_or_zero(accepted, view.rate(metrics.PROPOSED_TOKENS, *conditions, by=by))


def server_proposals_accepted(view: View, by: tuple[str, ...] = ()) -> str:
    """Share of the tokens proposed by a server's own method that became part of answers, or zero without a method."""
    share = ratio_or_zero(
        view.rate(metrics.ENGINE_ACCEPTED_TOKENS, by=by), view.rate(metrics.ENGINE_PROPOSED_TOKENS, by=by)
    )
    return or_zero(share, view.gauge(metrics.ENGINE_SERVERS, by=by))


def server_restarts(view: View, by: tuple[str, ...] = ()) -> str:
    """How often replicas have started their own servers again in the window."""
    return view.increase(metrics.ENGINE_SERVER_RESTARTS, by=by)


def stage_seconds_per_answer(view: View) -> str:
    """Mean seconds of each stage per answer."""
    answers = parenthesized(view.count(metrics.ANSWER_SECONDS))
    labels = ", ".join(view.by)
    spent = view.rate(metrics.SPENT_SECONDS, 'on!="answer"', by=("on",))
    return f"{spent} / on ({labels}) group_left () ({answers} > 0)"


def acceptance_by_position(view: View, condition: str) -> str:
    """Acceptance rate by position.

    Positions have two digits, so that they sort correctly.
    """
    accepted_by_position = proposals_accepted(view, condition, by=("method", "position"))
    return f'label_replace({accepted_by_position}, "position", "0$1", "position", "([0-9])")'


def router_busy_share(view: View) -> str:
    """Share of the time in which a part worked for a router, averaged over routers."""
    return view.aggregated("avg", f"rate({view.series(metrics.BUSY_SECONDS)}[{view.window}])", ("part",))


def drafts_per_answer(view: View) -> str:
    """Verified drafts per answer with a draft."""
    verified = view.rate(metrics.DRAFT_OUTCOMES, 'verdict!="skipped"', by=("mode",))
    return ratio(view.rate(metrics.VERIFICATION_ROUNDS, by=("mode",)), verified)


def reporting_replicas(view: View) -> tuple[str, str]:
    """Numbers of routers and of engines that report, per deployment.

    Each of them reports one series of a certain gauge, which is counted.
    """
    routers, engines = view.series(metrics.ANSWER_SLOTS), view.series(metrics.ENGINE_REQUESTS_RUNNING)
    return view.aggregated("count", routers, ("deployment",)), view.aggregated("count", engines, ("deployment",))
