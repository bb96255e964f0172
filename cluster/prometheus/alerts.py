"""The alerts, each with first steps for the operator.

docs/monitoring.md has a section for each alert.
"""

from dataclasses import dataclass
from typing import Any, Literal

from cluster.prometheus.rules import RECORDS, SOURCES
from deployments.observability import metrics


@dataclass(frozen=True)
class Alert:
    """An alert, which fires while its comparison holds.

    If there is a guard, it must also have a series with the same labels.
    """

    name: str
    expression: str
    comparison: str
    hold_time: str
    severity: Literal["critical", "warning"]
    summary: str
    description: str
    guard: str = ""

    @property
    def expr(self) -> str:
        compared = f"{self.expression} {self.comparison}"
        return f"({compared}) and {self.guard}" if self.guard else compared

    def rule(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.hold_time,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook": f"docs/monitoring.md#{self.name.lower()}",
            },
        }


def recorded_series(name: str, selector: str = "") -> str:
    """Returns a recorded figure as one series.

    If the figure comes from both sources, the alert still fires only once.
    """
    if name not in RECORDS:
        raise ValueError(f"{name} is not recorded")
    return f"max without (source) ({name}{selector})"


REPORTING = "|".join(f"{prefix}{metrics.ANSWER_SLOTS.name}" for prefix in SOURCES.values())

ALERTS = (
    Alert(
        name="ParseNotReporting",
        expression=f'(count({{__name__=~"{REPORTING}"}}) or vector(0))',
        comparison="< 1",
        hold_time="2m",
        severity="critical",
        summary="No router reports metrics.",
        description=(
            "The service most likely does not respond. Check /health and /ready, and the replicas in `serve status`. "
            "Under Status, Targets, Prometheus shows why it cannot scrape the service."
        ),
    ),
    Alert(
        name="ParseFailures",
        expression=recorded_series("application:parse_failures:ratio_rate5m"),
        comparison="> 0.05",
        hold_time="5m",
        severity="critical",
        summary="{{ $value | humanizePercentage }} of the requests to {{ $labels.application }} fail.",
        description=(
            "The overview dashboard shows the outcome. overloaded: add verifiers, or let clients retry later. "
            "unavailable: no verifier responds, see `serve status`. timeout: answers take longer than "
            "request_timeout_s. failed: there is an internal error, see the logs."
        ),
    ),
    Alert(
        name="ParseVerifierInTrouble",
        expression=recorded_series("application:parse_trouble:max", '{part="verifier"}'),
        comparison=">= 1",
        hold_time="2m",
        severity="critical",
        summary="No verifier of {{ $labels.application }} responds.",
        description=(
            "Requests wait and then fail. /ready shows the reason. Check the replicas of Verifier in `serve status`, "
            "and the logs of the last one that crashed: is it out of memory, or is a device lost? If the target runs "
            "on vLLM servers, check those."
        ),
    ),
    Alert(
        name="ParseDrafterInTrouble",
        expression=recorded_series("application:parse_trouble:max", '{part="drafter"}'),
        comparison=">= 1",
        hold_time="5m",
        severity="warning",
        summary="No drafter of {{ $labels.application }} responds.",
        description=(
            "The target answers alone, which is correct but slower. /ready shows the reason. Check the replicas of "
            "Drafter in `serve status`, and their logs."
        ),
    ),
    Alert(
        name="ParseVerifiersLost",
        expression=recorded_series("application:parse_lost_calls:increase15m"),
        comparison="> 3",
        hold_time="1m",
        severity="warning",
        summary="Verifiers of {{ $labels.application }} crash repeatedly.",
        description=(
            "In the last 15 minutes {{ $value | humanize }} calls were lost with their verifier and repeated. Clients "
            "see pauses. The pipeline dashboard shows the cause. The logs of Verifier show why its replicas end."
        ),
    ),
    Alert(
        name="ParseReplicasSilent",
        expression=recorded_series("application:parse_unreached_replicas:increase2m"),
        comparison="> 1",
        hold_time="5m",
        severity="warning",
        summary="Replicas of {{ $labels.application }} do not report metrics.",
        description=(
            "The figures of the service are incomplete. A replica that starts or stops is missing once. A replica that "
            "is missing for minutes hangs. Check `serve status`. The pipeline dashboard shows the deployment."
        ),
    ),
    Alert(
        name="ParseQueueSaturated",
        expression=recorded_series("application:parse_waiting:ratio"),
        comparison="> 0.5",
        hold_time="5m",
        severity="warning",
        summary="Requests to {{ $labels.application }} wait for a slot.",
        description=(
            "There are {{ $value | humanize }} waiting requests per slot. If more than max_queued_requests wait, "
            "further requests are rejected. If the verifiers are busy (engine dashboard), add verifiers. If they are "
            "not, raise max_answers."
        ),
    ),
    Alert(
        name="ParseAcceptanceCollapsed",
        expression=recorded_series("application:parse_judged_accepted:ratio_rate5m"),
        comparison="< 0.3",
        hold_time="10m",
        severity="warning",
        summary="Only {{ $value | humanizePercentage }} of the draft tokens of {{ $labels.application }} are accepted.",
        description=(
            "Drafts cost time and are rejected. Check whether models, templates or thresholds have changed, or whether "
            "clients ask new kinds of questions. See P(correct) on the quality dashboard. Until the cause is fixed, "
            "mode off or auto saves the cost."
        ),
        guard=f"{recorded_series('application:parse_judged_tokens:rate5m')} > 1",
    ),
    Alert(
        name="ParseDraftingCosts",
        expression=recorded_series("application:parse_judged_speed_up:ratio_rate5m"),
        comparison="< 1",
        hold_time="15m",
        severity="warning",
        summary="Drafting for {{ $labels.application }} costs more than it saves.",
        description=(
            "Answers with drafts take longer than the target alone would need. The speed-up is {{ $value | humanize "
            "}}. Check the accepted share, the times of the stages and the overlap. Let clients request auto, which "
            "pauses drafting while it does not pay. If the drafters are the bottleneck, add drafters."
        ),
    ),
    Alert(
        name="ParseAuditsDisagree",
        expression=recorded_series("application:parse_disagreement:ratio_increase1h"),
        comparison="> 0.2",
        hold_time="15m",
        severity="warning",
        summary="{{ $value | humanizePercentage }} of the audits of {{ $labels.application }} disagree.",
        description=(
            "The target alone has different results than the drafts that it accepted. Raise full and prefix, and "
            "compare answers of mode full and off. If a question has many correct answers, some disagreement is "
            "expected."
        ),
        guard=f"{recorded_series('application:parse_audited:increase1h')} >= 20",
    ),
)


def alerts() -> dict[str, Any]:
    return {"groups": [{"name": "parse", "rules": [alert.rule() for alert in ALERTS]}]}
