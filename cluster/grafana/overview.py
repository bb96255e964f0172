"""Is it fast, is it used, does it fail?"""

from cluster.grafana.boards import SERVICE_VARIABLES, SERVICE_VIEW, Board, Row, percentile_queries
from cluster.grafana.panels import (
    BAD,
    CAUTION,
    GOOD,
    NEUTRAL,
    REQUESTS_PER_SECOND,
    SECONDS,
    SHARE,
    TIMES,
    TOKENS_PER_SECOND,
    PanelOptions,
    Query,
    stat_panel,
    time_series_panel,
)
from cluster.prometheus import figures
from deployments.observability import metrics

VIEW = SERVICE_VIEW
ALL_MODES_VIEW = VIEW.without("mode")  # requests are counted by what they asked for, answers by what was done

NOW = Row(
    "Now",
    [
        stat_panel(
            PanelOptions(
                "Speed-up",
                "How much longer the target alone would have taken for the same tokens, going by its own pace while it "
                "writes. Under 1, drafting costs more than it gives.",
                TIMES,
            ),
            figures.speed_up(VIEW),
            [(1.0, CAUTION), (1.2, GOOD)],
            base_colour=BAD,
            decimals=2,
        ),
        stat_panel(
            PanelOptions(
                "Accepted",
                "Share of drafted tokens that stand in answers. Low: the draft model guesses badly or is judged too "
                "strictly, and its work is thrown away.",
                SHARE,
            ),
            figures.accepted_share(VIEW),
            [(0.3, CAUTION), (0.6, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "Requests",
                "Requests that ended, a second, in whatever mode and with whatever outcome. None at all, where there "
                "should be some: look at what is before the service.",
                REQUESTS_PER_SECOND,
            ),
            ALL_MODES_VIEW.rate(metrics.REQUESTS),
            base_colour=NEUTRAL,
        ),
        stat_panel(
            PanelOptions(
                "Tokens",
                "Tokens of answers, a second, whoever wrote them. Falling while requests do not: answers get slower "
                "or shorter.",
                TOKENS_PER_SECOND,
            ),
            figures.answer_tokens(VIEW, ""),
            base_colour=NEUTRAL,
        ),
        stat_panel(
            PanelOptions(
                "Latency p95",
                "Of 20 answers 19 took no longer from arrival to end, waiting included. Good is what your clients "
                "wait for; the colours begin at 10 and 30 s.",
                SECONDS,
            ),
            VIEW.quantile(0.95, metrics.ANSWER_SECONDS),
            [(10.0, CAUTION), (30.0, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Failures",
                "Share of requests that the service failed: overloaded, unavailable, timed out, or by a fault of its "
                "own. From 1% on, look below for which.",
                SHARE,
            ),
            figures.failure_share(VIEW),
            [(0.01, CAUTION), (0.05, BAD)],
            base_colour=GOOD,
        ),
    ],
)

GAIN = Row(
    "What drafting gains",
    [
        time_series_panel(
            PanelOptions(
                "Speed-up by mode",
                "How much longer the target alone would have taken, for each mode. The dashed line is the target "
                "alone: a mode that stays under it should not be asked for.",
                TIMES,
                width=12,
            ),
            Query(figures.speed_up(VIEW, by=("mode",)), "{{mode}}"),
            limit=(1.0, BAD),
        ),
        time_series_panel(
            PanelOptions(
                "Tokens by who wrote them",
                "Tokens a second: accepted from drafts, written by the target, and rejected, which reached nobody. "
                "Much of the last is work for nothing.",
                TOKENS_PER_SECOND,
                width=12,
            ),
            Query(VIEW.rate(metrics.ACCEPTED_TOKENS), "accepted"),
            Query(VIEW.rate(metrics.TARGET_TOKENS), "written"),
            Query(VIEW.rate(metrics.REJECTED_TOKENS), "rejected"),
            stacked=True,
        ),
    ],
)

TRAFFIC = Row(
    "Traffic",
    [
        time_series_panel(
            PanelOptions(
                "Requests by outcome",
                "Requests a second, by how they ended. All but ok, invalid, unauthorized and left are failures of the "
                "service.",
                REQUESTS_PER_SECOND,
            ),
            Query(ALL_MODES_VIEW.rate(metrics.REQUESTS, by=("outcome",)), "{{outcome}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Answers by mode",
                "Answers a second, by what was done for them. Much off where clients ask for auto: drafting does not "
                "pay, or there is no drafter.",
                REQUESTS_PER_SECOND,
            ),
            Query(VIEW.rate(metrics.ANSWERS, by=("mode",)), "{{mode}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Answers cut short",
                "Share of answers that ended at a limit of tokens, not by themselves. High: clients' limits are too "
                "low, or a model does not find its end.",
                SHARE,
            ),
            Query(figures.truncated_share(VIEW), "cut short"),
            max_value=1.0,
        ),
    ],
)

LATENCY = Row(
    "Latency",
    [
        time_series_panel(
            PanelOptions(
                "Answers",
                "Time from arrival to the end of an answer, waiting included: the middle one, and the slowest 5% and "
                "1%. A p99 far above the rest: some wait, or write alone.",
                SECONDS,
            ),
            *percentile_queries(VIEW, metrics.ANSWER_SECONDS),
        ),
        time_series_panel(
            PanelOptions(
                "First token",
                "Time from arrival to the first of an answer. Drafts that are judged whole come late and at once; "
                "high also in mode progressive or off: requests wait.",
                SECONDS,
            ),
            *percentile_queries(VIEW, metrics.TIME_TO_FIRST_TOKEN),
        ),
        time_series_panel(
            PanelOptions(
                "Between tokens",
                "Time between parts of a streamed answer, for each token of the later part. High: the verifiers have "
                "more at once than they can do smoothly.",
                SECONDS,
            ),
            *percentile_queries(VIEW, metrics.INTER_TOKEN_LATENCY),
        ),
    ],
)

FAILURES = Row(
    "Failures",
    [
        time_series_panel(
            PanelOptions(
                "Failures by outcome",
                "Requests a second that the service failed. overloaded: add verifiers. unavailable: they are gone. "
                "timeout: answers take too long. failed: see the logs.",
                REQUESTS_PER_SECOND,
                width=12,
            ),
            Query(ALL_MODES_VIEW.rate(metrics.REQUESTS, figures.FAILED_OUTCOMES, by=("outcome",)), "{{outcome}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Share of failures",
                "Share of requests that the service failed, of those that were its to answer. Over the dashed line, "
                "at 5%, somebody is called.",
                SHARE,
                width=12,
            ),
            Query(figures.failure_share(VIEW), "failed"),
            limit=(0.05, BAD),
        ),
    ],
)

OVERVIEW = Board(
    "overview",
    "PARSE / Overview",
    "Whether drafting pays, how much is asked, how long it takes, and what fails.",
    SERVICE_VARIABLES,
    [NOW, GAIN, TRAFFIC, LATENCY, FAILURES],
)
