"""Where the time of answers goes, and what goes wrong on the way."""

from cluster.grafana.boards import SERVICE_VARIABLES, SERVICE_VIEW, Board, Row, percentile_queries
from cluster.grafana.panels import (
    BAD,
    CAUTION,
    GOOD,
    PER_SECOND,
    SECONDS,
    SHARE,
    PanelOptions,
    Query,
    stat_panel,
    state_timeline_panel,
    time_series_panel,
)
from cluster.prometheus import figures
from deployments.observability import metrics

VIEW = SERVICE_VIEW

NOW = Row(
    "Now",
    [
        stat_panel(
            PanelOptions(
                "Overlap",
                "Of the time in which something was drafted, judged or written, the share in which both models worked. "
                "Near zero under load: one waits for the other.",
                SHARE,
            ),
            figures.overlap_share(VIEW),
            [(0.1, CAUTION), (0.25, GOOD)],
        ),
        stat_panel(
            PanelOptions(
                "Places in use",
                "Answers that are being worked on, over max_answers of all routers. At 100% new requests have to wait.",
                SHARE,
            ),
            figures.slots_in_use(VIEW),
            [(0.8, CAUTION), (1.0, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Waiting",
                "Requests that wait for a place. More than a few for minutes: add verifiers, or let clients be refused "
                "sooner (max_waiting).",
            ),
            VIEW.gauge(metrics.REQUESTS_WAITING),
            [(1.0, CAUTION), (16.0, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Fallbacks",
                "Share of answers that the target wrote alone because no drafter could: they are right, and slow. "
                "What auto decides by itself is not counted.",
                SHARE,
            ),
            figures.fallback_share(VIEW),
            [(0.01, CAUTION), (0.1, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Lost calls",
                "Calls that were lost with their verifier and made again, in the last 15 minutes. Any, without a "
                "change of what runs: replicas of Verifier die.",
            ),
            figures.lost_calls(VIEW.over("15m")),
            [(1.0, CAUTION), (4.0, BAD)],
            base_colour=GOOD,
            decimals=0,
        ),
        stat_panel(
            PanelOptions(
                "Unreached replicas",
                "Times that a replica's figures were missing from /metrics, in the last 15 minutes. Many: a replica "
                "hangs, and what is shown here is not all.",
            ),
            figures.unreached_replicas(VIEW.over("15m")),
            [(1.0, CAUTION), (10.0, BAD)],
            base_colour=GOOD,
            decimals=0,
        ),
    ],
)

STAGES = Row(
    "Where the time goes",
    [
        time_series_panel(
            PanelOptions(
                "Stages of an answer",
                "Seconds that an answer spends in each stage, on average: waiting, read ahead, drafted, judged, "
                "written. They overlap. Much write: drafts are rejected early; much queue: too few places.",
                SECONDS,
            ),
            Query(figures.stage_seconds_per_answer(VIEW), "{{on}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Slow stages, p95",
                "Of 20 times that a stage took, 19 were shorter. The stage that rises with latency is the one to look "
                "into.",
                SECONDS,
            ),
            Query(VIEW.quantile(0.95, metrics.STAGE_SECONDS, by=("stage",)), "{{stage}}"),
        ),
        time_series_panel(
            PanelOptions(
                "Wait for a place",
                "Time from arrival until work begins. It should be next to nothing; seconds mean that all places are "
                "taken.",
                SECONDS,
            ),
            *percentile_queries(VIEW, metrics.STAGE_SECONDS, condition='stage="queue"'),
        ),
    ],
)

CONCURRENCY = Row(
    "Drafters and verifiers at work",
    [
        time_series_panel(
            PanelOptions(
                "At work",
                "Share of its time in which, for a router, something was drafted, something was judged or written, and "
                "both at once. The one that nears 100% is what limits.",
                SHARE,
            ),
            Query(figures.router_busy_share(VIEW), "{{part}}"),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Overlap",
                "Of the time in which either model worked, the share in which both did. Low with many requests at "
                "once: one model is far slower, add replicas of it.",
                SHARE,
            ),
            Query(figures.overlap_share(VIEW), "both"),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Drafts judged",
                "Drafts that were judged, for each answer that had one: more than one in modes rounds and progressive. "
                "Many with little accepted: rounds that do not pay.",
            ),
            Query(figures.drafts_per_answer(VIEW), "{{mode}}"),
        ),
    ],
)

QUEUES = Row(
    "Queues",
    [
        time_series_panel(
            PanelOptions(
                "Places",
                "Answers at work, requests that wait, and the places there are. Work at the height of the places and a "
                "queue above them: saturated.",
                width=12,
            ),
            Query(VIEW.gauge(metrics.ANSWERS_RUNNING), "answering"),
            Query(VIEW.gauge(metrics.REQUESTS_WAITING), "waiting"),
            Query(VIEW.gauge(metrics.ANSWER_SLOTS), "places"),
        ),
        time_series_panel(
            PanelOptions(
                "Waiting for each place",
                "Requests that wait, over the places there are. Over the dashed line for 5 minutes, somebody is "
                "called.",
                width=12,
            ),
            Query(figures.waiting_ratio(VIEW), "waiting"),
            limit=(0.5, BAD),
        ),
    ],
)

FAULTS = Row(
    "What goes wrong",
    [
        time_series_panel(
            PanelOptions(
                "Lost calls by cause",
                "Calls that were lost with their verifier and made again, a second. died: a replica crashed; stopped: "
                "it was replaced in order; unavailable: none was there.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.RETRIES, by=("cause",)), "{{cause}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Fallbacks by cause",
                "Answers a second that the target wrote alone after all. does_not_pay is the choice of auto; busy, "
                "slow: add drafters; lost, silent, failed: see their logs.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.FALLBACKS, by=("cause",)), "{{cause}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Given up by cause",
                "Requests a second that were given up. left_waiting: clients left before anything was sent, so it "
                "takes too long; left_reading: while they read; timeout: over request_timeout_s.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.CANCELLATIONS, by=("cause",)), "{{cause}}"),
            stacked=True,
        ),
    ],
)

REPLICAS = Row(
    "Replicas",
    [
        state_timeline_panel(
            PanelOptions(
                "Who answers",
                "Whether drafters and verifiers answer the routers. Without a drafter answers are slow, without a "
                "verifier there are none.",
            ),
            Query(figures.trouble(VIEW), "{{part}}"),
            {0: ("answers", GOOD), 1: ("in trouble", BAD)},
        ),
        time_series_panel(
            PanelOptions(
                "Replicas that report",
                "Replicas whose figures arrive, of each deployment. Fewer than are configured: some have not started, "
                "hang or died.",
            ),
            *(Query(expression, "{{deployment}}") for expression in figures.reporting_replicas(VIEW)),
        ),
        time_series_panel(
            PanelOptions(
                "Unreached",
                "Replicas that did not tell their figures when /metrics was read, a second, by deployment. A few while "
                "replicas start or stop; steadily: one hangs.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.UNREACHED_REPLICAS, by=("part",)), "{{part}}"),
            stacked=True,
        ),
    ],
)

PIPELINE = Board(
    "pipeline",
    "PARSE / Pipeline",
    "How draft model and target work together, what waits, and what is lost on the way.",
    SERVICE_VARIABLES,
    [NOW, STAGES, CONCURRENCY, QUEUES, FAULTS, REPLICAS],
)
