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
                "Share of the answers with a draft whose drafts were accepted in full. This is the fastest case. If "
                "it is low, most drafts contain an error.",
                SHARE,
            ),
            figures.draft_outcome_share(VIEW, "whole"),
            [(0.2, CAUTION), (0.5, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "Rejected in full",
                "Share of the answers with a draft of which nothing was accepted. If it is high, drafts are wrong from "
                "the start. Check prompts and templates.",
                SHARE,
            ),
            figures.draft_outcome_share(VIEW, "none"),
            [(0.1, CAUTION), (0.3, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "P(correct) of accepted prefixes",
                "Median P(correct) of the accepted prefixes. If it is near the threshold, the target can hardly "
                "distinguish correct from wrong prefixes.",
                SHARE,
            ),
            VIEW.quantile(0.5, metrics.CORRECT_PROBABILITY, ACCEPTED),
            [(0.8, CAUTION), (0.93, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "Audits that disagree",
                "Share of audited answers for which the target alone had a different result, in the selected time "
                "range. If it is high, wrong drafts pass: raise full and prefix. A few audits are not significant.",
                SHARE,
            ),
            figures.disagreement_share(RANGE_VIEW),
            [(0.05, CAUTION), (0.2, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Audits",
                "Audited answers in the selected time range. With fewer than 20 audits, the disagreement is not "
                "significant. If there are none, audits are off, or the service is never idle.",
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
                "Answers per second by how much of their drafts was accepted: whole, partial, none, or skipped if there"
                " was no draft. If many are skipped, drafts are missing.",
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
                "Distribution of the accepted share over answers. Two bands, at the top and at the bottom, mean that "
                "drafts are either correct or useless. If all answers are at the bottom, drafting does not pay.",
                SHARE,
                width=12,
            ),
            VIEW.buckets(metrics.ACCEPTED_SHARE),
            DRAFT,
        ),
        time_series_panel(
            PanelOptions(
                "Accepted prefix length of first drafts",
                "Accepted tokens of the first draft of an answer. A quarter of the answers are below p25, and half "
                "below p50. If the numbers are low, the draft model makes errors early.",
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
                "P(correct) of the prefixes that were accepted. It should be near the top. A broad band down to the "
                "threshold means that the target guesses.",
                SHARE,
                width=12,
            ),
            VIEW.buckets(metrics.CORRECT_PROBABILITY, ACCEPTED),
            DRAFT,
        ),
        heatmap_panel(
            PanelOptions(
                "Rejected prefixes",
                "P(correct) of the prefixes that were not accepted. It should be near the bottom. A band just below "
                "the threshold means that good drafts may be rejected.",
                SHARE,
                width=12,
            ),
            VIEW.buckets(metrics.CORRECT_PROBABILITY, NOT_ACCEPTED),
            REJECTED,
        ),
        time_series_panel(
            PanelOptions(
                "Separation",
                "10th percentile of P(correct) of accepted prefixes, and 90th percentile of rejected ones. The "
                "further apart they are, the safer is the threshold. If they meet, the verification is random.",
                SHARE,
                width=12,
            ),
            Query(VIEW.quantile(0.1, metrics.CORRECT_PROBABILITY, ACCEPTED), "accepted"),
            Query(VIEW.quantile(0.9, metrics.CORRECT_PROBABILITY, NOT_ACCEPTED), "rejected"),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Answer mass",
                "Probability of both answer words together after a prefix: median and 10th percentile. If it is low, "
                "the target would reply with something else, and P(correct) means little.",
                SHARE,
                width=12,
            ),
            Query(VIEW.quantile(0.5, metrics.ANSWER_MASS), "median"),
            Query(VIEW.quantile(0.1, metrics.ANSWER_MASS), "10th percentile"),
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
                "Audits in the past hour: the same result (agree), a different one (disagree), or dropped because the "
                "router was never idle. If many are dropped, the shares below are not significant.",
            ),
            Query(VIEW.over("1h").increase(metrics.AUDITS, by=("result",)), "{{result}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Disagreement",
                "Share of the audits of the past hour with a different result. If it is above the dashed line with at "
                "least 20 audits, an alert fires, because wrong drafts pass.",
                SHARE,
            ),
            Query(figures.disagreement_share(VIEW.over("1h")), "disagree"),
            limit=(0.2, BAD),
        ),
        time_series_panel(
            PanelOptions(
                "Log-probability gap",
                "The target's mean log-probability of its own answer minus that of the answer that was sent, in nats "
                "per token. If it is near zero, the target would have answered almost the same. If it is large, the "
                "target words the answer differently, which matters only if no result is compared.",
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
    "How much of the drafts is accepted, how certain the target is, and whether it would have answered the same.",
    SERVICE_VARIABLES,
    [NOW, DRAFT_OUTCOMES, PROBABILITIES, AUDITS],
)
