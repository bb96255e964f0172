"""Every figure the service tells of itself: declared here once, and written to both ways out.

In production Ray's own pipeline takes it from every process to Prometheus, under a name that begins with `ray_`;
`/metrics` of the router gathers the same from all replicas, for a single node and for tests. A label takes no value
but those declared with it, so what a client sends never becomes one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, get_args

import prometheus_client as prometheus
from ray import serve

from deployments.observability.exposition import ReplicaLabels, ReplicaMetrics
from parse.protocol import Mode, StageName
from parse.types import FallbackCause, FinishReason, MethodName

prometheus.disable_created_metrics()  # a second series for each, of no use to us

RAY_METRICS: Any = serve.metrics  # its types know of one label only

Labels = Mapping[str, tuple[str, ...]]
RequestOutcome = Literal["ok", "invalid", "unauthorized", "overloaded", "unavailable", "timeout", "left", "failed"]
DraftOutcome = Literal["whole", "partial", "none", "skipped"]
RetryCause = Literal["died", "cancelled", "stopped", "unavailable"]
CancelCause = Literal["left_waiting", "left_reading", "timeout"]
AuditResult = Literal["agree", "disagree", "dropped"]
BusyPart = Literal["drafter", "verifier", "both"]
BlockState = Literal["used", "idle", "free"]

EXPORT_INTERVAL_S = 5.0  # Ray forgets a gauge that is not told again for 20 s

SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
SHARE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
PROBABILITY_BUCKETS = (
    0.01,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.85,
    0.9,
    0.93,
    0.95,
    0.97,
    0.99,
    0.999,
    1.0,
)
TOKEN_COUNT_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
NATS_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
POSITIONS = (*map(str, range(1, 17)), "17+")

MODE_LABEL: dict[str, tuple[str, ...]] = {
    "mode": tuple(mode for mode in get_args(Mode) if mode != "auto")
}  # what was done
PROPOSAL_LABELS: Labels = {"method": ("draft", *get_args(MethodName)), "position": POSITIONS}


@dataclass(frozen=True)
class Counter:
    name: str
    help: str
    labels: Labels = field(default_factory=dict)

    def create_local(self, registry: prometheus.CollectorRegistry) -> prometheus.Counter:
        counter = prometheus.Counter(self.name, self.help, tuple(self.labels), registry=registry)
        if self.labels:
            for labels in self._label_combinations():
                counter.labels(**labels)
        return counter

    def create_in_ray(self) -> Any:
        counter = RAY_METRICS.Counter(self.name, self.help, tuple(self.labels))
        for labels in self._label_combinations():
            counter._record(0.0, labels)  # `inc` takes no zero
        return counter

    def _label_combinations(self) -> Iterator[dict[str, str]]:
        """They start from zero, or rate() would miss the first of each kind."""
        return (dict(zip(self.labels, values, strict=True)) for values in product(*self.labels.values()))


@dataclass(frozen=True)
class Gauge:
    name: str
    help: str
    labels: Labels = field(default_factory=dict)

    def create_local(self, registry: prometheus.CollectorRegistry) -> prometheus.Gauge:
        return prometheus.Gauge(self.name, self.help, tuple(self.labels), registry=registry)

    def create_in_ray(self) -> Any:
        return RAY_METRICS.Gauge(self.name, self.help, tuple(self.labels))


@dataclass(frozen=True)
class Histogram:
    name: str
    help: str
    buckets: Sequence[float]
    labels: Labels = field(default_factory=dict)

    def create_local(self, registry: prometheus.CollectorRegistry) -> prometheus.Histogram:
        return prometheus.Histogram(self.name, self.help, tuple(self.labels), registry=registry, buckets=self.buckets)

    def create_in_ray(self) -> Any:
        return RAY_METRICS.Histogram(self.name, self.help, list(self.buckets), tuple(self.labels))


Metric = Counter | Gauge | Histogram

# Of requests and their answers, told by routers.

REQUESTS = Counter(
    "parse_requests_total",
    "Requests that have ended, by the mode they asked for; unknown where they were refused before that was read.",
    {"mode": (*get_args(Mode), "unknown"), "outcome": get_args(RequestOutcome)},
)
ANSWERS = Counter(
    "parse_answers_total",
    "Answers that were given, by what was done for them.",
    MODE_LABEL | {"finish": get_args(FinishReason)},
)
DRAFT_OUTCOMES = Counter(
    "parse_verdicts_total",
    "Answers by what became of their drafts: all of it kept, a part, nothing, or none was judged.",
    MODE_LABEL | {"verdict": get_args(DraftOutcome)},
)
PROMPT_TOKENS = Counter("parse_prompt_tokens_total", "Tokens of the prompts that were answered.")
CACHED_TOKENS = Counter("parse_cached_prompt_tokens_total", "Of them, those the verifier knew already.")
DRAFT_TOKENS = Counter("parse_drafted_tokens_total", "Tokens drafted for answers.", MODE_LABEL)
ACCEPTED_TOKENS = Counter("parse_accepted_tokens_total", "Of them, those that stand in the answers.", MODE_LABEL)
REJECTED_TOKENS = Counter("parse_rejected_tokens_total", "Of them, those that do not.", MODE_LABEL)
TARGET_TOKENS = Counter("parse_written_tokens_total", "Tokens of answers that the target wrote.", MODE_LABEL)
VERIFICATION_ROUNDS = Counter("parse_rounds_total", "Drafts that were judged.", MODE_LABEL)
ACCEPTED_SHARE = Histogram(
    "parse_accepted_share", "Accepted share of an answer's drafted tokens.", SHARE_BUCKETS, MODE_LABEL
)
ACCEPTED_PREFIX_LENGTH = Histogram(
    "parse_boundary_tokens", "Tokens kept of an answer's first draft.", TOKEN_COUNT_BUCKETS, MODE_LABEL
)
CORRECT_PROBABILITY = Histogram(
    "parse_correct_probability",
    "P(correct) at each cut that was asked about, by whether the prefix was kept.",
    PROBABILITY_BUCKETS,
    {"kept": ("yes", "no")},
)
STAGE_SECONDS = Histogram(
    "parse_stage_seconds",
    "Time an answer spent in a stage: waiting to be begun, read ahead by the target, drafted, judged, written by the "
    "target. Stages overlap.",
    SECONDS_BUCKETS,
    MODE_LABEL | {"stage": ("queue", *get_args(StageName))},
)
SPENT_SECONDS = Counter(
    "parse_spent_seconds_total",
    "Time spent on answers, from arrival to end, and of it in each stage: what the histograms say in buckets, exactly.",
    MODE_LABEL | {"on": ("answer", "queue", *get_args(StageName))},
)
TIME_TO_FIRST_TOKEN = Histogram(
    "parse_first_token_seconds", "From arrival to the first of an answer.", SECONDS_BUCKETS, MODE_LABEL
)
INTER_TOKEN_LATENCY = Histogram(
    "parse_inter_token_seconds",
    "Between two parts of a streamed answer, for each token of the later one; an accepted draft is one part.",
    INTER_TOKEN_BUCKETS,
    MODE_LABEL,
)
ANSWER_SECONDS = Histogram("parse_answer_seconds", "From arrival to the end of an answer.", SECONDS_BUCKETS, MODE_LABEL)
BUSY_SECONDS = Counter(
    "parse_busy_seconds_total",
    "Time in which something was drafted for this router, something was judged or written, and both at once.",
    {"part": get_args(BusyPart)},
)
ANSWERS_RUNNING = Gauge("parse_answering", "Answers a router is at work on.")
ANSWER_SLOTS = Gauge("parse_places", "Answers a router works on at most.")
REQUESTS_WAITING = Gauge("parse_waiting", "Requests that wait for a place.")
PART_UNAVAILABLE = Gauge(
    "parse_trouble", "1 where a part does not answer the router.", {"part": ("drafter", "verifier")}
)
RETRIES = Counter(
    "parse_retries_total", "Calls to verifiers that were lost and made again.", {"cause": get_args(RetryCause)}
)
FALLBACKS = Counter(
    "parse_fallbacks_total", "Answers that the target wrote alone after all.", {"cause": get_args(FallbackCause)}
)
CANCELLATIONS = Counter(
    "parse_cancellations_total",
    "Requests that were given up: the client left before anything was sent, or while it read, or it took too long.",
    {"cause": get_args(CancelCause)},
)
TARGET_PASSES = Counter(
    "parse_target_passes_total",
    "Passes of the target while it wrote answers several tokens at a time, by the method that proposed them; those "
    "without a proposal are among them.",
    {"method": get_args(MethodName)},
)
TARGET_PASS_TOKENS = Counter(
    "parse_target_pass_tokens_total",
    "Tokens of answers that came of them; in mode exact those of the draft as well.",
    {"method": get_args(MethodName)},
)
PROPOSED_TOKENS = Counter(
    "parse_proposed_tokens_total",
    "Tokens proposed to the target, to be taken as long as it would have written them, by who proposed them (draft: "
    "the draft of mode exact) and their place in the proposal.",
    PROPOSAL_LABELS,
)
ACCEPTED_PROPOSED_TOKENS = Counter(
    "parse_proposed_accepted_tokens_total", "Of them, those the target would have written.", PROPOSAL_LABELS
)
AUDITS = Counter(
    "parse_audits_total",
    "Answers with accepted drafts that the target answered again alone: with the same result, with another, or not "
    "at all for want of an idle moment.",
    {"result": get_args(AuditResult)},
)
AUDIT_GAP = Histogram(
    "parse_audit_gap_nats",
    "By how much the target finds its own answer likelier than the one that was sent: mean log-probability of a "
    "token, the difference.",
    NATS_BUCKETS,
)
UNREACHED_REPLICAS = Counter(
    "parse_unreached_replicas_total",
    "Replicas whose figures were missing when /metrics was read.",
    {"part": ("Router", "Drafter", "Verifier")},
)

# Of engines, told by the replicas of drafters and verifiers.

ENGINE_REQUESTS_RUNNING = Gauge("parse_engine_running", "Calls an engine is at work on.")
ENGINE_REQUESTS_WAITING = Gauge("parse_engine_waiting", "Calls that wait for the engine.")
ENGINE_KV_CACHE_BLOCKS = Gauge(
    "parse_engine_pages",
    "Pages of memory for keys and values: in use, kept only for those who come with the same beginning, free.",
    {"state": get_args(BlockState)},
)
ENGINE_STEPS = Counter("parse_engine_steps_total", "Forward passes.")
ENGINE_STEP_REQUESTS = Counter("parse_engine_step_calls_total", "Calls served in them: over passes, the batch.")
ENGINE_TOKENS = Counter("parse_engine_tokens_total", "Tokens computed.")
ENGINE_BUSY_SECONDS = Counter("parse_engine_busy_seconds_total", "Time spent in passes.")
ENGINE_PREFIX_CACHE_QUERIES = Counter("parse_engine_prefix_tokens_total", "Tokens looked for in the prefix cache.")
ENGINE_PREFIX_CACHE_HITS = Counter("parse_engine_prefix_hits_total", "Tokens found there.")
ENGINE_EVICTIONS = Counter("parse_engine_evictions_total", "Pages of the prefix cache given up for others.")

ROUTER_METRICS: tuple[Metric, ...] = (
    REQUESTS,
    ANSWERS,
    DRAFT_OUTCOMES,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    DRAFT_TOKENS,
    ACCEPTED_TOKENS,
    REJECTED_TOKENS,
    TARGET_TOKENS,
    VERIFICATION_ROUNDS,
    ACCEPTED_SHARE,
    ACCEPTED_PREFIX_LENGTH,
    CORRECT_PROBABILITY,
    STAGE_SECONDS,
    SPENT_SECONDS,
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    ANSWER_SECONDS,
    BUSY_SECONDS,
    ANSWERS_RUNNING,
    ANSWER_SLOTS,
    REQUESTS_WAITING,
    PART_UNAVAILABLE,
    RETRIES,
    FALLBACKS,
    CANCELLATIONS,
    TARGET_PASSES,
    TARGET_PASS_TOKENS,
    PROPOSED_TOKENS,
    ACCEPTED_PROPOSED_TOKENS,
    AUDITS,
    AUDIT_GAP,
    UNREACHED_REPLICAS,
)
ENGINE_METRICS: tuple[Metric, ...] = (
    ENGINE_REQUESTS_RUNNING,
    ENGINE_REQUESTS_WAITING,
    ENGINE_KV_CACHE_BLOCKS,
    ENGINE_STEPS,
    ENGINE_STEP_REQUESTS,
    ENGINE_TOKENS,
    ENGINE_BUSY_SECONDS,
    ENGINE_PREFIX_CACHE_QUERIES,
    ENGINE_PREFIX_CACHE_HITS,
    ENGINE_EVICTIONS,
)


class MetricsRecorder:
    """The figures of one replica, or of a process of its own."""

    def __init__(self, metrics: Sequence[Metric], *, deployment: str) -> None:
        context = serve.context._get_internal_replica_context()
        self.replica_labels = (
            ReplicaLabels("local", deployment, "local")
            if context is None
            else ReplicaLabels(context.app_name, context.deployment, context.replica_tag)
        )
        self._registry = prometheus.CollectorRegistry()
        self._local_metrics: dict[str, Any] = {metric.name: metric.create_local(self._registry) for metric in metrics}
        self._ray_metrics: dict[str, Any] = (
            {metric.name: metric.create_in_ray() for metric in metrics} if context else {}
        )
        self._totals: dict[tuple[str, tuple[str, ...]], float] = {}

    def add(self, metric: Counter, amount: float = 1, **labels: str) -> None:
        if amount <= 0:
            return
        self._local_series(metric, labels).inc(amount)
        if self._ray_metrics:
            self._ray_metrics[metric.name].inc(amount, labels)

    def update_total(self, metric: Counter, total: float, **labels: str) -> None:
        """For what somebody else counts."""
        key = (metric.name, tuple(labels.values()))
        self.add(metric, total - self._totals.get(key, 0.0), **labels)
        self._totals[key] = total

    def set(self, metric: Gauge, value: float, **labels: str) -> None:
        self._local_series(metric, labels).set(value)
        if self._ray_metrics:
            self._ray_metrics[metric.name].set(value, labels)

    def observe(self, metric: Histogram, value: float, **labels: str) -> None:
        self._local_series(metric, labels).observe(value)
        if self._ray_metrics:
            self._ray_metrics[metric.name].observe(value, labels)

    def collect(self) -> ReplicaMetrics:
        return ReplicaMetrics(self.replica_labels, list(self._registry.collect()))

    def _local_series(self, metric: Metric, labels: Mapping[str, str]) -> Any:
        for name, value in labels.items():
            if value not in metric.labels[name]:
                raise ValueError(f"{metric.name}: {value!r} is not declared for {name}")
        local_metric = self._local_metrics[metric.name]
        return local_metric.labels(**labels) if labels else local_metric
