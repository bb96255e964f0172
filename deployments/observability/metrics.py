"""The metrics of the service.

Each is declared here once, and written to two places.

In production Ray exports the metrics of every process to Prometheus, under names that begin with `ray_`. `/metrics` of
the router gathers the same metrics from all replicas, for a single node and for tests. A label takes only the values
that are declared with it, so nothing that a client sends becomes a label value.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import prometheus_client as prometheus
from ray import serve

from deployments.observability.exposition import ReplicaLabels, ReplicaMetrics
from deployments.observability.metric_types import Counter, Gauge, Histogram, Labels, Metric, MetricGroup
from deployments.session import RetryCause
from parse.errors import FallbackCause
from parse.events import StageName
from parse.registry import METHODS, MODES
from parse.types import FinishReason

prometheus.disable_created_metrics()  # they would add an unused second series to each metric

RequestOutcome = Literal["ok", "invalid", "unauthorized", "overloaded", "unavailable", "timeout", "left", "failed"]
DraftOutcome = Literal["whole", "partial", "none", "skipped"]
CancelCause = Literal["left_waiting", "left_reading", "timeout"]
AuditResult = Literal["agree", "disagree", "dropped"]
BusyPart = Literal["drafter", "verifier", "both"]
BlockState = Literal["used", "idle", "free"]
ServerState = Literal["responding", "failing"]

EXPORT_INTERVAL_S = 5.0  # Ray drops a gauge that has not been set for 20 s

SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
SHARE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
# fmt: off
PROBABILITY_BUCKETS = (
    0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99, 0.999, 1.0,
)
# fmt: on
TOKEN_COUNT_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
NATS_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
POSITIONS = (*map(str, range(1, 17)), "17+")

# The mode of an answer is the one that was used, so it is never "auto".
MODE_LABEL: Labels = {"mode": tuple(name for name, mode in MODES.items() if mode.function)}
METHOD_LABEL: Labels = {"method": tuple(METHODS)}
PROPOSAL_LABELS: Labels = {"method": ("draft", *METHODS), "position": POSITIONS}


ROUTER_METRICS = MetricGroup()
ENGINE_METRICS = MetricGroup()

# Requests and answers. Routers export these.

REQUESTS = ROUTER_METRICS.counter(
    "parse_requests_total",
    "Finished requests by requested mode and outcome. The mode is unknown if a request was rejected before its mode "
    "was read.",
    {"mode": (*MODES, "unknown"), "outcome": get_args(RequestOutcome)},
)
ANSWERS = ROUTER_METRICS.counter(
    "parse_answers_total",
    "Completed answers by the mode that was used and by the reason why the answer ended.",
    {**MODE_LABEL, "finish": get_args(FinishReason)},
)
DRAFT_OUTCOMES = ROUTER_METRICS.counter(
    "parse_verdicts_total",
    "Answers by how much of their drafts was accepted: all (whole), a part (partial) or nothing (none). For an answer "
    "without a draft, the verdict is skipped.",
    {**MODE_LABEL, "verdict": get_args(DraftOutcome)},
)
PROMPT_TOKENS = ROUTER_METRICS.counter("parse_prompt_tokens_total", "Prompt tokens of completed answers.")
CACHED_TOKENS = ROUTER_METRICS.counter(
    "parse_cached_prompt_tokens_total", "Prompt tokens that the verifier found in its prefix cache."
)
DRAFT_TOKENS = ROUTER_METRICS.counter(
    "parse_drafted_tokens_total", "Draft tokens written for completed answers.", MODE_LABEL
)
ACCEPTED_TOKENS = ROUTER_METRICS.counter(
    "parse_accepted_tokens_total", "Draft tokens that became part of the answers.", MODE_LABEL
)
REJECTED_TOKENS = ROUTER_METRICS.counter(
    "parse_rejected_tokens_total", "Draft tokens that did not become part of the answers.", MODE_LABEL
)
TARGET_TOKENS = ROUTER_METRICS.counter(
    "parse_written_tokens_total", "Answer tokens that the target generated.", MODE_LABEL
)
VERIFICATION_ROUNDS = ROUTER_METRICS.counter("parse_rounds_total", "Drafts that were used.", MODE_LABEL)
ACCEPTED_SHARE = ROUTER_METRICS.histogram(
    "parse_accepted_share", "The accepted share of an answer's draft tokens.", SHARE_BUCKETS, MODE_LABEL
)
ACCEPTED_PREFIX_LENGTH = ROUTER_METRICS.histogram(
    "parse_boundary_tokens",
    "The number of accepted tokens of an answer's first draft.",
    TOKEN_COUNT_BUCKETS,
    MODE_LABEL,
)
CORRECT_PROBABILITY = ROUTER_METRICS.histogram(
    "parse_correct_probability",
    "P(correct) of each verified prefix, by whether the prefix was accepted.",
    PROBABILITY_BUCKETS,
    {"kept": ("yes", "no")},
)
ANSWER_MASS = ROUTER_METRICS.histogram(
    "parse_answer_mass",
    "The probability of both answer words of a verification together, for each verified prefix. If it is low, "
    "P(correct) means little.",
    PROBABILITY_BUCKETS,
)
STAGE_SECONDS = ROUTER_METRICS.histogram(
    "parse_stage_seconds",
    "Seconds that an answer spent in a stage: queue, warm (the target prefills the prompt), draft, judge (the target "
    "verifies), write (the target generates). Stages overlap.",
    SECONDS_BUCKETS,
    {**MODE_LABEL, "stage": ("queue", *get_args(StageName))},
)
SPENT_SECONDS = ROUTER_METRICS.counter(
    "parse_spent_seconds_total",
    "Seconds spent on answers from arrival to end (answer), and in each stage. They are the exact sums of "
    "`parse_answer_seconds` and `parse_stage_seconds`.",
    {**MODE_LABEL, "on": ("answer", "queue", *get_args(StageName))},
)
TIME_TO_FIRST_TOKEN = ROUTER_METRICS.histogram(
    "parse_first_token_seconds",
    "Seconds from the arrival of a request to the first token of its answer.",
    SECONDS_BUCKETS,
    MODE_LABEL,
)
INTER_TOKEN_LATENCY = ROUTER_METRICS.histogram(
    "parse_inter_token_seconds",
    "Seconds between two deltas of a streamed answer, divided by the tokens of the later one. An accepted draft is one "
    "delta.",
    INTER_TOKEN_BUCKETS,
    MODE_LABEL,
)
ANSWER_SECONDS = ROUTER_METRICS.histogram(
    "parse_answer_seconds",
    "Seconds from the arrival of a request to the end of its answer.",
    SECONDS_BUCKETS,
    MODE_LABEL,
)
BUSY_SECONDS = ROUTER_METRICS.counter(
    "parse_busy_seconds_total",
    "Seconds in which drafters worked for this router, in which verifiers did, and in which both did.",
    {"part": get_args(BusyPart)},
)
ANSWERS_RUNNING = ROUTER_METRICS.gauge("parse_answering", "Answers that a router is generating.")
ANSWER_SLOTS = ROUTER_METRICS.gauge(
    "parse_places", "The maximum number of answers that a router generates at the same time."
)
REQUESTS_WAITING = ROUTER_METRICS.gauge("parse_waiting", "Requests that wait in the queue of a router.")
PART_UNAVAILABLE = ROUTER_METRICS.gauge(
    "parse_trouble",
    "1 if no replica of a part responds to the router, or if none of its vLLM servers can be used, otherwise 0.",
    {"part": ("drafter", "verifier")},
)
RETRIES = ROUTER_METRICS.counter(
    "parse_retries_total", "Calls to verifiers that were lost and repeated.", {"cause": get_args(RetryCause)}
)
FALLBACKS = ROUTER_METRICS.counter(
    "parse_fallbacks_total",
    "Answers that the target generated without a draft although drafting was requested. The cause is one of these: "
    "there is no drafter (none_there), mode auto has paused drafting (does_not_pay), all drafters are busy (busy), the "
    "drafter was lost (lost), it does not respond (silent), it exceeds `draft_timeout_s` (slow), it rejects the "
    "request (refused), it fails with another error (failed), the answer begins with reasoning (reasoning), the target "
    "does not reply to the verification prompt with one of the answer words (unreliable), or its engine cannot use a "
    "draft with the sampling parameters of the request (unsupported).",
    {"cause": get_args(FallbackCause)},
)
CANCELLATIONS = ROUTER_METRICS.counter(
    "parse_cancellations_total",
    "Cancelled requests: the client disconnected before the answer began (left_waiting) or while it received the "
    "answer (left_reading), or the request timed out.",
    {"cause": get_args(CancelCause)},
)
TARGET_PASSES = ROUTER_METRICS.counter(
    "parse_target_passes_total",
    "Forward passes of the target while it generated with a token-level method, including passes without a proposal.",
    METHOD_LABEL,
)
TARGET_PASS_TOKENS = ROUTER_METRICS.counter(
    "parse_target_pass_tokens_total",
    "Answer tokens from the passes in parse_target_passes_total. In mode exact, they include the draft's tokens.",
    METHOD_LABEL,
)
PROPOSED_TOKENS = ROUTER_METRICS.counter(
    "parse_proposed_tokens_total",
    "Tokens proposed to the target, by method and by position in the proposal. The method draft is the draft of mode "
    "exact.",
    PROPOSAL_LABELS,
)
ACCEPTED_PROPOSED_TOKENS = ROUTER_METRICS.counter(
    "parse_proposed_accepted_tokens_total", "Proposed tokens that the target accepted.", PROPOSAL_LABELS
)
AUDITS = ROUTER_METRICS.counter(
    "parse_audits_total",
    "Audited answers with accepted drafts. The target alone had the same result (agree) or a different one (disagree), "
    "or the audit failed or found no idle time (dropped).",
    {"result": get_args(AuditResult)},
)
AUDIT_GAP = ROUTER_METRICS.histogram(
    "parse_audit_gap_nats",
    "How much higher the target's mean log-probability per token is for its own answer than for the answer that was "
    "sent, in nats.",
    NATS_BUCKETS,
)
UNREACHED_REPLICAS = ROUTER_METRICS.counter(
    "parse_unreached_replicas_total",
    "Replicas that did not respond when /metrics was read.",
    {"part": ("Router", "Drafter", "Verifier")},
)

# Engines. Each replica of a drafter or verifier exports these.

ENGINE_REQUESTS_RUNNING = ENGINE_METRICS.gauge("parse_engine_running", "Calls that the engine computes.")
ENGINE_REQUESTS_WAITING = ENGINE_METRICS.gauge("parse_engine_waiting", "Calls that wait for the engine.")
ENGINE_KV_CACHE_BLOCKS = ENGINE_METRICS.gauge(
    "parse_engine_pages",
    "Blocks of the KV cache: held by calls (used), held only by the prefix cache (idle), or free.",
    {"state": get_args(BlockState)},
)
ENGINE_STEPS = ENGINE_METRICS.counter("parse_engine_steps_total", "Forward passes of the engine.")
ENGINE_STEP_REQUESTS = ENGINE_METRICS.counter(
    "parse_engine_step_calls_total",
    "Calls computed in forward passes, counted once per pass. Divided by the number of passes, this is the mean batch "
    "size.",
)
ENGINE_TOKENS = ENGINE_METRICS.counter("parse_engine_tokens_total", "Tokens that the engine has computed.")
ENGINE_BUSY_SECONDS = ENGINE_METRICS.counter("parse_engine_busy_seconds_total", "Seconds spent in forward passes.")
ENGINE_PREFIX_CACHE_QUERIES = ENGINE_METRICS.counter(
    "parse_engine_prefix_tokens_total", "Tokens looked up in the prefix cache."
)
ENGINE_PREFIX_CACHE_HITS = ENGINE_METRICS.counter("parse_engine_prefix_hits_total", "Tokens found in the prefix cache.")
ENGINE_EVICTIONS = ENGINE_METRICS.counter(
    "parse_engine_evictions_total", "Finished sequences evicted from the prefix cache."
)
ENGINE_PROPOSED_TOKENS = ENGINE_METRICS.counter(
    "parse_engine_proposed_tokens_total",
    "Tokens that the speculative method of a vLLM server has proposed, for all clients of this server.",
)
ENGINE_ACCEPTED_TOKENS = ENGINE_METRICS.counter(
    "parse_engine_proposed_accepted_tokens_total", "Those of the proposed tokens that became part of answers."
)
ENGINE_SERVERS = ENGINE_METRICS.gauge(
    "parse_engine_servers",
    "vLLM servers of a remote engine: those that respond with the right model (responding), and the others (failing).",
    {"state": get_args(ServerState)},
)
ENGINE_SERVER_RESTARTS = ENGINE_METRICS.counter(
    "parse_engine_server_restarts_total",
    "How often a replica has started its own vLLM server again, because it had ended or did not respond.",
)


class MetricsRecorder:
    """Records the metrics of one replica, or of a process outside Ray Serve."""

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
        """Raises a counter to a total that is counted elsewhere."""
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
