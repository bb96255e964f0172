"""Where the time of answers goes, and what goes wrong on the way."""

from cluster.grafana.boards import OF_SERVICE, SERVICE_VARIABLES, Board, Row, percentiles
from cluster.grafana.panels import (
    BAD,
    CAUTION,
    GOOD,
    PER_SECOND,
    SECONDS,
    SHARE,
    About,
    Query,
    lines,
    states,
    tile,
)
from cluster.prometheus import figures
from deployments.observability import metrics

VIEW = OF_SERVICE

NOW = Row(
    "Now",
    [
        tile(
            About(
                "Overlap",
                "Of the time in which something was drafted, judged or written, the share in which both models worked. "
                "Near zero under load: one waits for the other.",
                SHARE,
            ),
            figures.overlap(VIEW),
            [(0.1, CAUTION), (0.25, GOOD)],
        ),
        tile(
            About(
                "Places in use",
                "Answers that are being worked on, over max_answers of all routers. At 100% new requests have to wait.",
                SHARE,
            ),
            figures.in_use(VIEW),
            [(0.8, CAUTION), (1.0, BAD)],
            plain=GOOD,
        ),
        tile(
            About(
                "Waiting",
                "Requests that wait for a place. More than a few for minutes: add verifiers, or let clients be refused "
                "sooner (max_waiting).",
            ),
            VIEW.gauge(metrics.REQUESTS_WAITING),
            [(1.0, CAUTION), (16.0, BAD)],
            plain=GOOD,
        ),
        tile(
            About(
                "Fallbacks",
                "Share of answers that the target wrote alone because no drafter could: they are right, and slow. "
                "What auto decides by itself is not counted.",
                SHARE,
            ),
            figures.fallbacks(VIEW),
            [(0.01, CAUTION), (0.1, BAD)],
            plain=GOOD,
        ),
        tile(
            About(
                "Lost calls",
                "Calls that were lost with their verifier and made again, in the last 15 minutes. Any, without a "
                "change of what runs: replicas of Verifier die.",
            ),
            figures.lost_calls(VIEW.over("15m")),
            [(1.0, CAUTION), (4.0, BAD)],
            plain=GOOD,
            decimals=0,
        ),
        tile(
            About(
                "Unreached replicas",
                "Times that a replica's figures were missing from /metrics, in the last 15 minutes. Many: a replica "
                "hangs, and what is shown here is not all.",
            ),
            figures.unreached(VIEW.over("15m")),
            [(1.0, CAUTION), (10.0, BAD)],
            plain=GOOD,
            decimals=0,
        ),
    ],
)

STAGES = Row(
    "Where the time goes",
    [
        lines(
            About(
                "Stages of an answer",
                "Seconds that an answer spends in each stage, on average: waiting, read ahead, drafted, judged, "
                "written. They overlap. Much write: drafts are rejected early; much queue: too few places.",
                SECONDS,
            ),
            Query(figures.stage_of_answer(VIEW), "{{on}}"),
            stacked=True,
        ),
        lines(
            About(
                "Slow stages, p95",
                "Of 20 times that a stage took, 19 were shorter. The stage that rises with latency is the one to look "
                "into.",
                SECONDS,
            ),
            Query(VIEW.quantile(0.95, metrics.STAGE_SECONDS, by=("stage",)), "{{stage}}"),
        ),
        lines(
            About(
                "Wait for a place",
                "Time from arrival until work begins. It should be next to nothing; seconds mean that all places are "
                "taken.",
                SECONDS,
            ),
            *percentiles(VIEW, metrics.STAGE_SECONDS, where='stage="queue"'),
        ),
    ],
)

TOGETHERNESS = Row(
    "Drafters and verifiers at work",
    [
        lines(
            About(
                "At work",
                "Share of its time in which, for a router, something was drafted, something was judged or written, and "
                "both at once. The one that nears 100% is what limits.",
                SHARE,
            ),
            Query(figures.at_work(VIEW), "{{part}}"),
            most=1.0,
        ),
        lines(
            About(
                "Overlap",
                "Of the time in which either model worked, the share in which both did. Low with many requests at "
                "once: one model is far slower, add replicas of it.",
                SHARE,
            ),
            Query(figures.overlap(VIEW), "both"),
            most=1.0,
        ),
        lines(
            About(
                "Drafts judged",
                "Drafts that were judged, for each answer that had one: more than one in modes rounds and progressive. "
                "Many with little accepted: rounds that do not pay.",
            ),
            Query(figures.rounds(VIEW), "{{mode}}"),
        ),
    ],
)

QUEUES = Row(
    "Queues",
    [
        lines(
            About(
                "Places",
                "Answers at work, requests that wait, and the places there are. Work at the height of the places and a "
                "queue above them: saturated.",
                width=12,
            ),
            Query(VIEW.gauge(metrics.ANSWERS_RUNNING), "answering"),
            Query(VIEW.gauge(metrics.REQUESTS_WAITING), "waiting"),
            Query(VIEW.gauge(metrics.ANSWER_SLOTS), "places"),
        ),
        lines(
            About(
                "Waiting for each place",
                "Requests that wait, over the places there are. Over the dashed line for 5 minutes, somebody is "
                "called.",
                width=12,
            ),
            Query(figures.waiting(VIEW), "waiting"),
            limit=(0.5, BAD),
        ),
    ],
)

WRONG = Row(
    "What goes wrong",
    [
        lines(
            About(
                "Lost calls by cause",
                "Calls that were lost with their verifier and made again, a second. died: a replica crashed; stopped: "
                "it was replaced in order; unavailable: none was there.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.RETRIES, by=("cause",)), "{{cause}}"),
            stacked=True,
        ),
        lines(
            About(
                "Fallbacks by cause",
                "Answers a second that the target wrote alone after all. does_not_pay is the choice of auto; busy, "
                "slow: add drafters; lost, silent, failed: see their logs.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.FALLBACKS, by=("cause",)), "{{cause}}"),
            stacked=True,
        ),
        lines(
            About(
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
        states(
            About(
                "Who answers",
                "Whether drafters and verifiers answer the routers. Without a drafter answers are slow, without a "
                "verifier there are none.",
            ),
            Query(figures.trouble(VIEW), "{{part}}"),
            {0: ("answers", GOOD), 1: ("in trouble", BAD)},
        ),
        lines(
            About(
                "Replicas that report",
                "Replicas whose figures arrive, of each deployment. Fewer than are configured: some have not started, "
                "hang or died.",
            ),
            *(Query(expression, "{{deployment}}") for expression in figures.reporting(VIEW)),
        ),
        lines(
            About(
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
    [NOW, STAGES, TOGETHERNESS, QUEUES, WRONG, REPLICAS],
)
