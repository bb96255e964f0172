"""Are drafts judged rightly? What is kept, how sure the target was, and what audits say of it."""

from cluster.grafana.boards import SERVICE_VARIABLES, SERVICE_VIEW, Board, Row, percentile_queries
from cluster.grafana.panels import (
    BAD,
    CAUTION,
    DRAFT,
    GOOD,
    NEUTRAL,
    PER_SECOND,
    REJECTED,
    SHARE,
    PanelOptions,
    Query,
    heatmap_panel,
    stat_panel,
    time_series_panel,
)
from cluster.prometheus import figures
from deployments.observability import metrics

VIEW = SERVICE_VIEW
RANGE_VIEW = VIEW.over("$__range")  # audits are few: all that the page shows
ACCEPTED, NOT_ACCEPTED = 'kept="yes"', 'kept="no"'

NOW = Row(
    "Now",
    [
        stat_panel(
            PanelOptions(
                "Accepted",
                "Share of drafted tokens that stand in answers. Low: the draft model guesses badly or is judged too "
                "strictly.",
                SHARE,
            ),
            figures.accepted_share(VIEW),
            [(0.3, CAUTION), (0.6, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "Kept whole",
                "Share of judged answers whose draft stands from beginning to end: the fastest there are. Low: most "
                "drafts go wrong somewhere.",
                SHARE,
            ),
            figures.draft_outcome_share(VIEW, "whole"),
            [(0.2, CAUTION), (0.5, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "Nothing kept",
                "Share of judged answers of whose draft nothing stands: drafted and judged for nothing. High: drafts "
                "begin wrongly, look at prompts and templates.",
                SHARE,
            ),
            figures.draft_outcome_share(VIEW, "none"),
            [(0.1, CAUTION), (0.3, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "P(correct) of what was kept",
                "How sure the target was of a prefix that was kept, in the middle. Near the threshold: it hardly tells "
                "right from wrong.",
                SHARE,
            ),
            VIEW.quantile(0.5, metrics.CORRECT_PROBABILITY, ACCEPTED),
            [(0.8, CAUTION), (0.93, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "Audits that disagree",
                "Share of audited answers that the target alone answered with another result, in the time shown. High: "
                "wrong drafts pass, raise full and prefix. Of few audits, it says little.",
                SHARE,
            ),
            figures.disagreement_share(RANGE_VIEW),
            [(0.05, CAUTION), (0.2, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Audits",
                "Answers that were answered again by the target alone, in the time shown. Under 20, their disagreement "
                "says little; none: audits are off, or there is never an idle moment.",
            ),
            figures.audits(RANGE_VIEW),
            [(20.0, NEUTRAL)],
            decimals=0,
        ),
    ],
)

DRAFT_OUTCOMES = Row(
    "What becomes of drafts",
    [
        time_series_panel(
            PanelOptions(
                "Verdicts",
                "Answers a second by what became of their drafts: the whole kept, a part, nothing, or none was judged. "
                "Much skipped: no drafts are made.",
                PER_SECOND,
                width=12,
            ),
            Query(VIEW.rate(metrics.DRAFT_OUTCOMES, by=("verdict",)), "{{verdict}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Accepted share by mode",
                "Share of drafted tokens that stand, for each mode. One mode far below the others: do not ask for it.",
                SHARE,
                width=12,
            ),
            Query(figures.accepted_share(VIEW, by=("mode",)), "{{mode}}"),
            max_value=1.0,
        ),
        heatmap_panel(
            PanelOptions(
                "Accepted share of each answer",
                "How many answers had which share of their draft accepted. Two bands, at the top and at the bottom, "
                "mean that drafts are right or useless; all at the bottom, that drafting does not pay.",
                SHARE,
                width=12,
            ),
            VIEW.buckets(metrics.ACCEPTED_SHARE),
            DRAFT,
        ),
        time_series_panel(
            PanelOptions(
                "Tokens kept of a first draft",
                "How far the first draft of an answer carries: a quarter carry less than p25, half less than p50. Few "
                "tokens: the draft model loses the thread early.",
                width=12,
            ),
            *percentile_queries(VIEW, metrics.ACCEPTED_PREFIX_LENGTH, percents=(25, 50, 75)),
        ),
    ],
)

PROBABILITIES = Row(
    "P(correct), as the target judged",
    [
        heatmap_panel(
            PanelOptions(
                "Prefixes that were kept",
                "How sure the target was at each cut that was kept. It should lie at the top; a broad band down to the "
                "threshold means that it guesses.",
                SHARE,
            ),
            VIEW.buckets(metrics.CORRECT_PROBABILITY, ACCEPTED),
            DRAFT,
        ),
        heatmap_panel(
            PanelOptions(
                "Prefixes that were not kept",
                "How sure the target was at each cut that was not kept. It should lie at the bottom; a band right "
                "under the threshold means that good drafts may be thrown away.",
                SHARE,
            ),
            VIEW.buckets(metrics.CORRECT_PROBABILITY, NOT_ACCEPTED),
            REJECTED,
        ),
        time_series_panel(
            PanelOptions(
                "How well they part",
                "The least sure tenth of what was kept, and the surest tenth of what was not. The further they are "
                "apart, the safer the threshold between them; where they meet, judging is chance.",
                SHARE,
            ),
            Query(VIEW.quantile(0.1, metrics.CORRECT_PROBABILITY, ACCEPTED), "kept"),
            Query(VIEW.quantile(0.9, metrics.CORRECT_PROBABILITY, NOT_ACCEPTED), "not kept"),
            max_value=1.0,
        ),
    ],
)

AUDITS = Row(
    "Audits: the target asked again, alone",
    [
        time_series_panel(
            PanelOptions(
                "Audits by result",
                "Audits in each hour before: the same result, another, or dropped for want of an idle moment. Much "
                "dropped: the verifiers are never idle, and little is known.",
            ),
            Query(VIEW.over("1h").increase(metrics.AUDITS, by=("result",)), "{{result}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Share that disagrees",
                "Of the audits of the hour before, those with another result. Over the dashed line, with 20 audits and "
                "more, somebody is called: wrong drafts pass.",
                SHARE,
            ),
            Query(figures.disagreement_share(VIEW.over("1h")), "disagree"),
            limit=(0.2, BAD),
        ),
        time_series_panel(
            PanelOptions(
                "Gap",
                "By how much the target finds its own answer likelier than the one that was sent, in nats a token. "
                "Near zero: it would have said much the same. Large: in other words, which is bad only where no result "
                "is compared.",
                "suffix: nats",
            ),
            *percentile_queries(VIEW.over("1h"), metrics.AUDIT_GAP, percents=(50, 95)),
            Query(VIEW.over("1h").mean(metrics.AUDIT_GAP), "mean"),
        ),
    ],
)

QUALITY = Board(
    "quality",
    "PARSE / Quality",
    "What is kept of drafts, how sure the target is of it, and whether it would have said the same.",
    SERVICE_VARIABLES,
    [NOW, DRAFT_OUTCOMES, PROBABILITIES, AUDITS],
)
