"""The quality dashboard: acceptance of drafts, P(correct), and audits."""

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
RANGE_VIEW = VIEW.over("$__range")  # audits are rare, so the whole time range is used
ACCEPTED, NOT_ACCEPTED = 'kept="yes"', 'kept="no"'

NOW = Row(
    "Now",
    [
        stat_panel(
            PanelOptions(
                "Accepted",
                "Share of draft tokens that became part of answers. If it is low, the draft model is often wrong or "
                "the verification is too strict.",
                SHARE,
            ),
            figures.accepted_share(VIEW),
            [(0.3, CAUTION), (0.6, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "Accepted in full",
                "Share of the answers with a verified draft whose draft was accepted in full: the fastest case. Low:"
                " most drafts contain an error.",
                SHARE,
            ),
            figures.draft_outcome_share(VIEW, "whole"),
            [(0.2, CAUTION), (0.5, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "Rejected in full",
                "Share of the answers with a verified draft of which nothing was accepted. High: drafts go wrong "
                "from the start, check prompts and templates.",
                SHARE,
            ),
            figures.draft_outcome_share(VIEW, "none"),
            [(0.1, CAUTION), (0.3, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "P(correct) of accepted prefixes",
                "Median P(correct) of the accepted prefixes. Near the threshold, the target can hardly distinguish "
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
                "Share of audited answers for which the target alone had a different result, in the time range "
                "shown. High: wrong drafts pass, so raise full and prefix. With few audits it says little.",
                SHARE,
            ),
            figures.disagreement_share(RANGE_VIEW),
            [(0.05, CAUTION), (0.2, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Audits",
                "Answers that the target answered again alone, in the time range shown. With fewer than 20, the "
                "disagreement says little. None: audits are off, or the service is never idle.",
            ),
            figures.audits(RANGE_VIEW),
            [(20.0, NEUTRAL)],
            decimals=0,
        ),
    ],
)

DRAFT_OUTCOMES = Row(
    "Verification of drafts",
    [
        time_series_panel(
            PanelOptions(
                "Drafts by result",
                "Answers per second by how much of their drafts was accepted: whole, partial, none, or skipped if no"
                " draft was verified. Much skipped: there are no drafts.",
                PER_SECOND,
                width=12,
            ),
            Query(VIEW.rate(metrics.DRAFT_OUTCOMES, by=("verdict",)), "{{verdict}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Accepted share by mode",
                "Share of draft tokens that were accepted, for each mode. Do not use a mode that is far below the "
                "others.",
                SHARE,
                width=12,
            ),
            Query(figures.accepted_share(VIEW, by=("mode",)), "{{mode}}"),
            max_value=1.0,
        ),
        heatmap_panel(
            PanelOptions(
                "Accepted share per answer",
                "Distribution of the accepted share over answers. Two bands, at the top and at the bottom: drafts "
                "are either right or useless. All at the bottom: drafting does not pay.",
                SHARE,
                width=12,
            ),
            VIEW.buckets(metrics.ACCEPTED_SHARE),
            DRAFT,
        ),
        time_series_panel(
            PanelOptions(
                "Accepted prefix length of first drafts",
                "Accepted tokens of the first draft of an answer: a quarter of the answers are below p25, half below"
                " p50. Few tokens: the draft model makes errors early.",
                width=12,
            ),
            *percentile_queries(VIEW, metrics.ACCEPTED_PREFIX_LENGTH, percents=(25, 50, 75)),
        ),
    ],
)

PROBABILITIES = Row(
    "P(correct) according to the target",
    [
        heatmap_panel(
            PanelOptions(
                "Accepted prefixes",
                "P(correct) of the prefixes that were accepted. It should be near the top; a broad band down to the "
                "threshold means that the target guesses.",
                SHARE,
            ),
            VIEW.buckets(metrics.CORRECT_PROBABILITY, ACCEPTED),
            DRAFT,
        ),
        heatmap_panel(
            PanelOptions(
                "Rejected prefixes",
                "P(correct) of the prefixes that were not accepted. It should be near the bottom; a band just below "
                "the threshold means that good drafts may be rejected.",
                SHARE,
            ),
            VIEW.buckets(metrics.CORRECT_PROBABILITY, NOT_ACCEPTED),
            REJECTED,
        ),
        time_series_panel(
            PanelOptions(
                "Separation",
                "10th percentile of P(correct) of accepted prefixes, and 90th percentile of rejected ones. The "
                "further apart they are, the safer the threshold; where they meet, verification is chance.",
                SHARE,
            ),
            Query(VIEW.quantile(0.1, metrics.CORRECT_PROBABILITY, ACCEPTED), "accepted"),
            Query(VIEW.quantile(0.9, metrics.CORRECT_PROBABILITY, NOT_ACCEPTED), "rejected"),
            max_value=1.0,
        ),
    ],
)

AUDITS = Row(
    "Audits: the target answers again, alone",
    [
        time_series_panel(
            PanelOptions(
                "Audits by result",
                "Audits in the past hour: the same result, a different one, or dropped because the router was never "
                "idle. Many dropped: little is known about the quality.",
            ),
            Query(VIEW.over("1h").increase(metrics.AUDITS, by=("result",)), "{{result}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Disagreement",
                "Share of the audits of the past hour with a different result. Above the dashed line, with at least "
                "20 audits, an alert fires: wrong drafts pass.",
                SHARE,
            ),
            Query(figures.disagreement_share(VIEW.over("1h")), "disagree"),
            limit=(0.2, BAD),
        ),
        time_series_panel(
            PanelOptions(
                "Log-probability gap",
                "How much more likely the target finds its own answer than the one that was sent, in nats per token."
                " Near zero: it would have said much the same. Large: it uses other words, which is bad only if no "
                "result is compared.",
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
    "How much of the drafts is accepted, how sure the target is, and whether it would have answered the same.",
    SERVICE_VARIABLES,
    [NOW, DRAFT_OUTCOMES, PROBABILITIES, AUDITS],
)
