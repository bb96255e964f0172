"""Are drafts judged rightly? What is kept, how sure the target was, and what audits say of it."""

from cluster.grafana.boards import OF_SERVICE, SERVICE_VARIABLES, Board, Row, percentiles
from cluster.grafana.panels import (
    BAD,
    CAUTION,
    DRAFT,
    GOOD,
    PER_SECOND,
    REJECTED,
    SHARE,
    TOGETHER,
    About,
    Query,
    heat,
    lines,
    tile,
)
from cluster.prometheus import figures
from deployments.observability import metrics

VIEW = OF_SERVICE
SHOWN = VIEW.over("$__range")  # audits are few: all that the page shows
KEPT, NOT_KEPT = 'kept="yes"', 'kept="no"'

NOW = Row(
    "Now",
    [
        tile(
            About(
                "Accepted",
                "Share of drafted tokens that stand in answers. Low: the draft model guesses badly or is judged too "
                "strictly.",
                SHARE,
            ),
            figures.accepted(VIEW),
            [(0.3, CAUTION), (0.6, GOOD)],
            plain=BAD,
        ),
        tile(
            About(
                "Kept whole",
                "Share of judged answers whose draft stands from beginning to end: the fastest there are. Low: most "
                "drafts go wrong somewhere.",
                SHARE,
            ),
            figures.verdicts(VIEW, "whole"),
            [(0.2, CAUTION), (0.5, GOOD)],
            plain=BAD,
        ),
        tile(
            About(
                "Nothing kept",
                "Share of judged answers of whose draft nothing stands: drafted and judged for nothing. High: drafts "
                "begin wrongly, look at prompts and templates.",
                SHARE,
            ),
            figures.verdicts(VIEW, "none"),
            [(0.1, CAUTION), (0.3, BAD)],
            plain=GOOD,
        ),
        tile(
            About(
                "P(correct) of what was kept",
                "How sure the target was of a prefix that was kept, in the middle. Near the threshold: it hardly tells "
                "right from wrong.",
                SHARE,
            ),
            VIEW.quantile(0.5, metrics.CORRECT_PROBABILITY, KEPT),
            [(0.8, CAUTION), (0.93, GOOD)],
            plain=BAD,
        ),
        tile(
            About(
                "Audits that disagree",
                "Share of audited answers that the target alone answered with another result, in the time shown. High: "
                "wrong drafts pass, raise full and prefix. Of few audits, it says little.",
                SHARE,
            ),
            figures.disagreement(SHOWN),
            [(0.05, CAUTION), (0.2, BAD)],
            plain=GOOD,
        ),
        tile(
            About(
                "Audits",
                "Answers that were answered again by the target alone, in the time shown. Under 20, their disagreement "
                "says little; none: audits are off, or there is never an idle moment.",
            ),
            figures.audited(SHOWN),
            [(20.0, TOGETHER)],
            decimals=0,
        ),
    ],
)

VERDICTS = Row(
    "What becomes of drafts",
    [
        lines(
            About(
                "Verdicts",
                "Answers a second by what became of their drafts: the whole kept, a part, nothing, or none was judged. "
                "Much skipped: no drafts are made.",
                PER_SECOND,
                width=12,
            ),
            Query(VIEW.rate(metrics.DRAFT_OUTCOMES, by=("verdict",)), "{{verdict}}"),
            stacked=True,
        ),
        lines(
            About(
                "Accepted share by mode",
                "Share of drafted tokens that stand, for each mode. One mode far below the others: do not ask for it.",
                SHARE,
                width=12,
            ),
            Query(figures.accepted(VIEW, by=("mode",)), "{{mode}}"),
            most=1.0,
        ),
        heat(
            About(
                "Accepted share of each answer",
                "How many answers had which share of their draft accepted. Two bands, at the top and at the bottom, "
                "mean that drafts are right or useless; all at the bottom, that drafting does not pay.",
                SHARE,
                width=12,
            ),
            VIEW.buckets(metrics.ACCEPTED_SHARE),
            DRAFT,
        ),
        lines(
            About(
                "Tokens kept of a first draft",
                "How far the first draft of an answer carries: a quarter carry less than p25, half less than p50. Few "
                "tokens: the draft model loses the thread early.",
                width=12,
            ),
            *percentiles(VIEW, metrics.ACCEPTED_PREFIX_LENGTH, of=(25, 50, 75)),
        ),
    ],
)

PROBABILITIES = Row(
    "P(correct), as the target judged",
    [
        heat(
            About(
                "Prefixes that were kept",
                "How sure the target was at each cut that was kept. It should lie at the top; a broad band down to the "
                "threshold means that it guesses.",
                SHARE,
            ),
            VIEW.buckets(metrics.CORRECT_PROBABILITY, KEPT),
            DRAFT,
        ),
        heat(
            About(
                "Prefixes that were not kept",
                "How sure the target was at each cut that was not kept. It should lie at the bottom; a band right "
                "under the threshold means that good drafts may be thrown away.",
                SHARE,
            ),
            VIEW.buckets(metrics.CORRECT_PROBABILITY, NOT_KEPT),
            REJECTED,
        ),
        lines(
            About(
                "How well they part",
                "The least sure tenth of what was kept, and the surest tenth of what was not. The further they are "
                "apart, the safer the threshold between them; where they meet, judging is chance.",
                SHARE,
            ),
            Query(VIEW.quantile(0.1, metrics.CORRECT_PROBABILITY, KEPT), "kept"),
            Query(VIEW.quantile(0.9, metrics.CORRECT_PROBABILITY, NOT_KEPT), "not kept"),
            most=1.0,
        ),
    ],
)

AUDITS = Row(
    "Audits: the target asked again, alone",
    [
        lines(
            About(
                "Audits by result",
                "Audits in each hour before: the same result, another, or dropped for want of an idle moment. Much "
                "dropped: the verifiers are never idle, and little is known.",
            ),
            Query(VIEW.over("1h").increase(metrics.AUDITS, by=("result",)), "{{result}}"),
            stacked=True,
        ),
        lines(
            About(
                "Share that disagrees",
                "Of the audits of the hour before, those with another result. Over the dashed line, with 20 audits and "
                "more, somebody is called: wrong drafts pass.",
                SHARE,
            ),
            Query(figures.disagreement(VIEW.over("1h")), "disagree"),
            limit=(0.2, BAD),
        ),
        lines(
            About(
                "Gap",
                "By how much the target finds its own answer likelier than the one that was sent, in nats a token. "
                "Near zero: it would have said much the same. Large: in other words, which is bad only where no result "
                "is compared.",
                "suffix: nats",
            ),
            *percentiles(VIEW.over("1h"), metrics.AUDIT_GAP, of=(50, 95)),
            Query(VIEW.over("1h").mean(metrics.AUDIT_GAP), "mean"),
        ),
    ],
)

QUALITY = Board(
    "quality",
    "PARSE / Quality",
    "What is kept of drafts, how sure the target is of it, and whether it would have said the same.",
    SERVICE_VARIABLES,
    [NOW, VERDICTS, PROBABILITIES, AUDITS],
)
