"""The pipeline dashboard: time per stage, queues, and lost calls."""

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
                "The time in which both models worked, as a share of the time in which at least one did. If it is near "
                "zero under load, one model waits for the other.",
                SHARE,
            ),
            figures.overlap_share(VIEW),
            [(0.1, CAUTION), (0.25, GOOD)],
        ),
        stat_panel(
            PanelOptions(
                "Slots in use",
                "Answers in progress, divided by max_answers of all routers. If it is 100%, new requests have to wait.",
                SHARE,
            ),
            figures.slots_in_use(VIEW),
            [(0.8, CAUTION), (1.0, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Waiting",
                "Requests in the queues of the routers. If there are more than a few for minutes, add verifiers, or "
                "lower max_queued_requests to reject requests earlier.",
            ),
            VIEW.gauge(metrics.REQUESTS_WAITING),
            [(1.0, CAUTION), (16.0, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Fallbacks",
                "Share of answers that the target generated alone because there was no draft. They are correct but "
                "slow. Answers for which auto chose not to draft are not counted.",
                SHARE,
            ),
            figures.fallback_share(VIEW),
            [(0.01, CAUTION), (0.1, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Lost calls",
                "Calls that were lost with their verifier and repeated, in the last 15 minutes. If there are any "
                "although you did not change the deployment, replicas of Verifier crash.",
            ),
            figures.lost_calls(VIEW.over("15m")),
            [(1.0, CAUTION), (4.0, BAD)],
            base_colour=GOOD,
            decimals=0,
        ),
        stat_panel(
            PanelOptions(
                "Unreached replicas",
                "How often the metrics of a replica were missing from /metrics, in the last 15 minutes. If it is "
                "often, a replica hangs, and the figures on the dashboards are incomplete.",
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
                "Mean time per answer in each stage: queue, warm (prefill), draft, judge (verification), write "
                "(generation). Stages overlap. If write is long, drafts are rejected early. If queue is long, there "
                "are too few slots.",
                SECONDS,
            ),
            Query(figures.stage_seconds_per_answer(VIEW), "{{on}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Slow stages, p95",
                "95th percentile of the time that a stage takes. If the latency rises, look for the stage that rises "
                "with it.",
                SECONDS,
            ),
            Query(VIEW.quantile(0.95, metrics.STAGE_SECONDS, by=("stage",)), "{{stage}}"),
        ),
        time_series_panel(
            PanelOptions(
                "Queueing time",
                "Time from the arrival of a request until the pipeline starts on it. It should be close to zero. If it "
                "is seconds, all slots are in use.",
                SECONDS,
            ),
            *percentile_queries(VIEW, metrics.STAGE_SECONDS, condition='stage="queue"'),
        ),
    ],
)

CONCURRENCY = Row(
    "Drafters and verifiers",
    [
        time_series_panel(
            PanelOptions(
                "Busy",
                "Share of the time in which a drafter worked for a router, in which a verifier did, and in which both "
                "did. The part that is near 100% is the bottleneck.",
                SHARE,
            ),
            Query(figures.router_busy_share(VIEW), "{{part}}"),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Overlap",
                "The time in which both models worked, as a share of the time in which at least one did. If it is low"
                " with many concurrent requests, one model is far slower. Add replicas of it.",
                SHARE,
            ),
            Query(figures.overlap_share(VIEW), "both"),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Drafts per answer",
                "Drafts per answer with a draft. In mode rounds there can be more than one. If there are many drafts "
                "and few accepted tokens, the additional rounds do not pay.",
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
                "Slots",
                "Answers in progress, waiting requests, and the number of slots. If all slots are in use and "
                "requests wait, the service is saturated.",
                width=12,
            ),
            Query(VIEW.gauge(metrics.ANSWERS_RUNNING), "running"),
            Query(VIEW.gauge(metrics.REQUESTS_WAITING), "waiting"),
            Query(VIEW.gauge(metrics.ANSWER_SLOTS), "slots"),
        ),
        time_series_panel(
            PanelOptions(
                "Waiting requests per slot",
                "Waiting requests divided by the number of slots. If it is above the dashed line for 5 minutes, an "
                "alert fires.",
                width=12,
            ),
            Query(figures.waiting_ratio(VIEW), "waiting"),
            limit=(0.5, BAD),
        ),
    ],
)

FAULTS = Row(
    "Lost calls, fallbacks and cancellations",
    [
        time_series_panel(
            PanelOptions(
                "Lost calls by cause",
                "Calls per second that were lost with their verifier and repeated. died: the replica crashed. stopped:"
                " its engine was stopped. unavailable: there was no replica. cancelled: Ray cancelled the call.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.RETRIES, by=("cause",)), "{{cause}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Fallbacks by cause",
                "Answers per second that the target generated without a draft. does_not_pay is a decision of auto. "
                "busy, slow: add drafters. lost, silent, failed: see the logs of the drafters.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.FALLBACKS, by=("cause",)), "{{cause}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Cancellations by cause",
                "Cancelled requests per second. left_waiting: the client disconnected before the answer began, so the "
                "answer may take too long. left_reading: the client disconnected while it received the answer. "
                "timeout: the request took longer than request_timeout_s.",
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
                "Availability",
                "Whether drafters and verifiers respond to the routers. Without a drafter, answers are slow. Without "
                "a verifier, there are no answers.",
            ),
            Query(figures.trouble(VIEW), "{{part}}"),
            {0: ("responds", GOOD), 1: ("unavailable", BAD)},
        ),
        time_series_panel(
            PanelOptions(
                "Reporting replicas",
                "Replicas whose metrics arrive, for each deployment. If there are fewer than configured, some replicas "
                "have not started, hang or have crashed.",
            ),
            *(Query(expression, "{{deployment}}") for expression in figures.reporting_replicas(VIEW)),
        ),
        time_series_panel(
            PanelOptions(
                "Unreached replicas by deployment",
                "Replicas per second that did not respond when /metrics was read. A few are normal while replicas "
                "start or stop. If the number stays above zero, a replica hangs.",
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
    "How the draft model and the target work together, which requests wait, and which calls are lost.",
    SERVICE_VARIABLES,
    [NOW, STAGES, CONCURRENCY, QUEUES, FAULTS, REPLICAS],
)
