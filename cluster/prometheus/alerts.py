"""What an operator is called for, and what to do first. The rest is in docs/monitoring.md, a paragraph for each."""

from dataclasses import dataclass
from typing import Any, Literal

from cluster.prometheus.rules import RECORDS, SOURCES
from deployments.observability import metrics


@dataclass(frozen=True)
class Alert:
    """Fires while the expression compares so, and the guard, if there is one, has a series for its labels."""

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
    """One series, though figures may come by both ways: nobody is to be called twice."""
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
        summary="No router reports any figure.",
        description=(
            "Nothing is known of the service, and most likely it does not answer. Ask /health and /ready of it, "
            "`serve status` for its replicas, and Prometheus, under Status, Targets, why it cannot scrape."
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
            "See on the overview with which outcome. overloaded: add verifiers, or have clients wait. unavailable: "
            "verifiers are gone, see `serve status`. timeout: answers take longer than request_timeout_s. failed: a "
            "fault of the service, see its logs."
        ),
    ),
    Alert(
        name="ParseVerifierInTrouble",
        expression=recorded_series("application:parse_trouble:max", '{part="verifier"}'),
        comparison=">= 1",
        hold_time="2m",
        severity="critical",
        summary="No verifier of {{ $labels.application }} answers.",
        description=(
            "Requests wait, and then fail. /ready says why. See `serve status` for the replicas of Verifier, and the "
            "logs of the last that died: out of memory, or a device that is lost?"
        ),
    ),
    Alert(
        name="ParseDrafterInTrouble",
        expression=recorded_series("application:parse_trouble:max", '{part="drafter"}'),
        comparison=">= 1",
        hold_time="5m",
        severity="warning",
        summary="No drafter of {{ $labels.application }} answers.",
        description=(
            "The target answers alone: right, but slower. /ready says why. See `serve status` for the replicas of "
            "Drafter, and their logs."
        ),
    ),
    Alert(
        name="ParseVerifiersLost",
        expression=recorded_series("application:parse_lost_calls:increase15m"),
        comparison="> 3",
        hold_time="1m",
        severity="warning",
        summary="Verifiers of {{ $labels.application }} are being lost.",
        description=(
            "In 15 minutes {{ $value | humanize }} calls were lost with their verifier and made again; clients see "
            "pauses. See on the pipeline's dashboard for what cause, and in the logs of Verifier why replicas end."
        ),
    ),
    Alert(
        name="ParseReplicasSilent",
        expression=recorded_series("application:parse_unreached_replicas:increase2m"),
        comparison="> 1",
        hold_time="5m",
        severity="warning",
        summary="Replicas of {{ $labels.application }} do not tell their figures.",
        description=(
            "What is shown of the service is not all of it. A replica that starts or stops is missed once; one that "
            "is missed for minutes hangs. See `serve status`, and on the pipeline's dashboard which part it is."
        ),
    ),
    Alert(
        name="ParseQueueSaturated",
        expression=recorded_series("application:parse_waiting:ratio"),
        comparison="> 0.5",
        hold_time="5m",
        severity="warning",
        summary="Requests to {{ $labels.application }} wait for a place.",
        description=(
            "To each place there are {{ $value | humanize }} requests waiting; past max_waiting they are refused. If "
            "the verifiers are busy (engine's dashboard), add some; if they are not, raise max_answers."
        ),
    ),
    Alert(
        name="ParseAcceptanceCollapsed",
        expression=recorded_series("application:parse_judged_accepted:ratio_rate5m"),
        comparison="< 0.3",
        hold_time="10m",
        severity="warning",
        summary="Only {{ $value | humanizePercentage }} of what is drafted for {{ $labels.application }} is accepted.",
        description=(
            "Drafts cost, and are thrown away. Were models, templates or thresholds changed, or do clients ask "
            "something new? See P(correct) on the dashboard of quality. Until then mode off, or auto, saves the cost."
        ),
        guard=f"{recorded_series('application:parse_judged_tokens:rate5m')} > 1",
    ),
    Alert(
        name="ParseDraftingCosts",
        expression=recorded_series("application:parse_judged_speed_up:ratio_rate5m"),
        comparison="< 1",
        hold_time="15m",
        severity="warning",
        summary="Drafting for {{ $labels.application }} costs more than it gives.",
        description=(
            "Answers with drafts take longer than the target alone would: speed-up {{ $value | humanize }}. See "
            "acceptance, the times of stages and the overlap. Have clients ask for auto, which pauses drafting that "
            "does not pay, or add drafters where they are the ones that are waited for."
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
            "The target alone comes to other results than what it let pass. Raise full and prefix, and compare "
            "answers of mode full and off. Where many answers are right, a part of it is expected."
        ),
        guard=f"{recorded_series('application:parse_audited:increase1h')} >= 20",
    ),
)


def alerts() -> dict[str, Any]:
    return {"groups": [{"name": "parse", "rules": [alert.rule() for alert in ALERTS]}]}
