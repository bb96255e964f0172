"""The figures that say how the service does, each a query over a view of it."""

from cluster.prometheus.queries import View, grouped, or_none, share, share_or_none
from deployments.observability import metrics

JUDGED = 'mode!~"exact|off"'  # answers whose drafts were judged
COMPARED = 'mode!="exact"'  # in exact, what the target writes and what it accepts come from the same passes
FAILURES = 'outcome=~"overloaded|unavailable|timeout|failed"'
OURS = 'outcome!~"invalid|unauthorized|left"'  # what clients do to themselves is no failure of the service
UNWANTED = 'cause!="does_not_pay"'  # the service's own choice
DRAFTS, METHODS = 'method="draft"', 'method!="draft"'  # who proposes tokens to the target
LOST = 'cause!="stopped"'  # replicas that are stopped end their work first, and are no trouble


def accepted(view: View, *conditions: str, by: tuple[str, ...] = ()) -> str:
    """Share of drafted tokens that stand in answers."""
    return share_or_none(
        view.rate(metrics.ACCEPTED_TOKENS, *conditions, by=by), view.rate(metrics.DRAFT_TOKENS, *conditions, by=by)
    )


def answer_tokens(view: View, condition: str = COMPARED, by: tuple[str, ...] = ()) -> str:
    """Tokens of answers a second, whoever wrote them."""
    conditions = (condition,) if condition else ()
    answers = view.count(metrics.ANSWER_SECONDS, *conditions, by=by)
    parts = (metrics.ACCEPTED_TOKENS, metrics.TARGET_TOKENS)
    return " + ".join(or_none(view.rate(part, *conditions, by=by), answers) for part in parts)


def pace(view: View) -> str:
    """Seconds that the target takes to write a token itself."""
    everywhere = view.without("mode")  # its pace is its own, whichever modes are looked at
    return share(
        everywhere.rate(metrics.SPENT_SECONDS, 'on="write"', COMPARED), everywhere.rate(metrics.TARGET_TOKENS, COMPARED)
    )


def speed_up(view: View, condition: str = COMPARED, by: tuple[str, ...] = ()) -> str:
    """How long the target alone would have taken for the same tokens, over the time that was taken, waiting aside."""
    matched = f" on ({', '.join(view.by)}) group_left ()" if by else ""
    alone = f"({answer_tokens(view, condition, by)}) *{matched} ({pace(view)})"
    queued = view.rate(metrics.SPENT_SECONDS, 'on="queue"', condition, by=by)
    answering = view.rate(metrics.SPENT_SECONDS, 'on="answer"', condition, by=by)
    return f"{alone} / ({answering} - {or_none(queued, answering)} > 0)"


def failures(view: View) -> str:
    """Share of requests that the service failed, of those that were its to answer."""
    everywhere = view.without("mode")  # requests are counted by what they asked for, answers by what was done
    return share_or_none(everywhere.rate(metrics.REQUESTS, FAILURES), everywhere.rate(metrics.REQUESTS, OURS))


def cut_short(view: View) -> str:
    """Share of answers that ended at a limit."""
    return share_or_none(view.rate(metrics.ANSWERS, 'finish="length"'), view.rate(metrics.ANSWERS))


def overlap(view: View) -> str:
    """Of the time in which drafter or verifier worked, the share in which both did."""
    drafter, verifier, both = (
        view.rate(metrics.BUSY_SECONDS, f'part="{part}"') for part in ("drafter", "verifier", "both")
    )
    either = f"{drafter} + {verifier} - {or_none(both, verifier)}"
    return share(or_none(both, verifier), f"({either})")


def waiting(view: View) -> str:
    """Requests that wait, over the places there are."""
    return share(view.gauge(metrics.REQUESTS_WAITING), view.gauge(metrics.ANSWER_SLOTS))


def in_use(view: View) -> str:
    return share(view.gauge(metrics.ANSWERS_RUNNING), view.gauge(metrics.ANSWER_SLOTS))


def fallbacks(view: View) -> str:
    """Share of answers that were to have a draft, and had none for want of a drafter that works."""
    everywhere = view.without("mode")  # fallbacks are counted by their cause
    return share_or_none(everywhere.rate(metrics.FALLBACKS, UNWANTED), everywhere.rate(metrics.ANSWERS))


def audited(view: View) -> str:
    """Answers that were answered again, over the window."""
    return view.increase(metrics.AUDITS, 'result=~"agree|disagree"')


def disagreement(view: View) -> str:
    """Of them, the share in which the target alone came to another result."""
    return share_or_none(view.increase(metrics.AUDITS, 'result="disagree"'), audited(view))


def lost_calls(view: View) -> str:
    """None are lost as long as routers report and count none."""
    return or_none(view.increase(metrics.RETRIES, LOST), view.gauge(metrics.ANSWER_SLOTS))


def unreached(view: View) -> str:
    return or_none(view.increase(metrics.UNREACHED_REPLICAS), view.gauge(metrics.ANSWER_SLOTS))


def trouble(view: View) -> str:
    return view.gauge(metrics.PART_UNAVAILABLE, by=("part",), how="max")


def verdicts(view: View, verdict: str) -> str:
    """Share of judged answers with that verdict."""
    judged = view.rate(metrics.DRAFT_OUTCOMES, 'verdict!="skipped"')
    return share_or_none(view.rate(metrics.DRAFT_OUTCOMES, f'verdict="{verdict}"'), judged)


def batch(view: View, by: tuple[str, ...] = ()) -> str:
    return share(view.rate(metrics.ENGINE_STEP_REQUESTS, by=by), view.rate(metrics.ENGINE_STEPS, by=by))


def busy(view: View, by: tuple[str, ...] = ()) -> str:
    """Share of its time that an engine spends in passes, averaged over engines."""
    return view.aggregated("avg", f"rate({view.series(metrics.ENGINE_BUSY_SECONDS)}[{view.window}])", by)


def cache_hits(view: View, by: tuple[str, ...] = ()) -> str:
    return share_or_none(
        view.rate(metrics.ENGINE_PREFIX_CACHE_HITS, by=by), view.rate(metrics.ENGINE_PREFIX_CACHE_QUERIES, by=by)
    )


def pages(view: View, state: str, by: tuple[str, ...] = ()) -> str:
    """Share of an engine's pages in that state."""
    return share(
        view.gauge(metrics.ENGINE_KV_CACHE_BLOCKS, f'state="{state}"', by=by),
        view.gauge(metrics.ENGINE_KV_CACHE_BLOCKS, by=by),
    )


def known_prompt(view: View) -> str:
    return share_or_none(view.rate(metrics.CACHED_TOKENS), view.rate(metrics.PROMPT_TOKENS))


def tokens_per_pass(view: View, by: tuple[str, ...] = ()) -> str:
    """Of passes in which the target may write several."""
    return share(view.rate(metrics.TARGET_PASS_TOKENS, by=by), view.rate(metrics.TARGET_PASSES, by=by))


def proposals_accepted(view: View, *conditions: str, by: tuple[str, ...]) -> str:
    accepted = view.rate(metrics.ACCEPTED_PROPOSED_TOKENS, *conditions, by=by)
    return share_or_none(accepted, view.rate(metrics.PROPOSED_TOKENS, *conditions, by=by))


def stage_of_answer(view: View) -> str:
    """Seconds of each stage that come to an answer."""
    answers = grouped(view.count(metrics.ANSWER_SECONDS))
    kept = ", ".join(view.by)
    spent = view.rate(metrics.SPENT_SECONDS, 'on!="answer"', by=("on",))
    return f"{spent} / on ({kept}) group_left () ({answers} > 0)"


def proposals_by_place(view: View, condition: str) -> str:
    """The places as two digits, so that they stand in order."""
    accepted_at = proposals_accepted(view, condition, by=("method", "position"))
    return f'label_replace({accepted_at}, "position", "0$1", "position", "([0-9])")'


def at_work(view: View) -> str:
    """Share of a router's time, averaged over routers."""
    return view.aggregated("avg", f"rate({view.series(metrics.BUSY_SECONDS)}[{view.window}])", ("part",))


def rounds(view: View) -> str:
    """Drafts for each answer that had one judged."""
    judged = view.rate(metrics.DRAFT_OUTCOMES, 'verdict!="skipped"', by=("mode",))
    return share(view.rate(metrics.VERIFICATION_ROUNDS, by=("mode",)), judged)


def reporting(view: View) -> tuple[str, str]:
    """Routers, and engines, by a gauge that each of them has."""
    routers, engines = view.series(metrics.ANSWER_SLOTS), view.series(metrics.ENGINE_REQUESTS_RUNNING)
    return view.aggregated("count", routers, ("deployment",)), view.aggregated("count", engines, ("deployment",))
