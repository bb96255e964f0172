"""Writes docs/metrics.md from the declared metrics.

python -m deployments.observability.metrics_reference > docs/metrics.md
"""

from collections.abc import Sequence

from deployments.observability.metric_types import Counter, Gauge, Histogram, Metric
from deployments.observability.metrics import ENGINE_METRICS, ROUTER_METRICS

HEADER = """\
<!-- `make docs` writes this file. Change deployments/observability/metrics.py instead. -->

# Metrics

You can read the metrics in two places:

- `GET /metrics` of the service returns the metrics of all routers, drafters and verifiers, with the names below and the
  labels `application`, `deployment` and `replica`. If the API needs a key, this path needs one too. A replica that does
  not respond within a second is left out and counted in `parse_unreached_replicas_total`.
- Ray exports the same metrics from every node, under names that begin with `ray_`. They have the same labels and those
  that Ray adds. Use this source in a cluster, because it needs no request to a router.

[monitoring.md](monitoring.md) describes the dashboards and alerts. A request is counted when it ends. An answer is
counted only if it is complete. The metrics of answers are therefore exactly the sums of `usage` and `parse` in the
responses. Except for `parse_accepted_share`, which is a histogram over answers, ratios are not exported. Compute them
in a query, for example accepted tokens divided by drafted tokens. A label has only the values listed here.
"""


def render_metrics_page() -> str:
    return "\n".join(
        [
            HEADER,
            "## Requests and answers\n\nEach router exports these metrics.\n",
            render_metrics_table(ROUTER_METRICS),
            "## Engines\n\nEach replica of a drafter or verifier exports these metrics. The label `deployment` tells "
            "them apart.\n",
            render_metrics_table(ENGINE_METRICS),
        ]
    )


def render_metrics_table(metrics: Sequence[Metric]) -> str:
    lines = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{metric.name}` | {describe_kind(metric)} | {describe_labels(metric)} | {metric.help} |"
        for metric in metrics
    ]
    return "\n".join(lines) + "\n"


def describe_kind(metric: Metric) -> str:
    match metric:
        case Counter():
            return "counter"
        case Gauge():
            return "gauge"
        case Histogram(buckets=buckets):
            return f"histogram, {len(buckets)} buckets from {buckets[0]:g} to {buckets[-1]:g}"


def describe_labels(metric: Metric) -> str:
    return "; ".join(f"`{name}`: {_format_values(values)}" for name, values in metric.labels.items())


def _format_values(values: Sequence[str]) -> str:
    numbered = [value for value in values if value.isdecimal()]
    if len(numbered) > 2:
        return f"{numbered[0]} to {numbered[-1]}, {', '.join(value for value in values if value not in numbered)}"
    return ", ".join(values)


if __name__ == "__main__":
    print(render_metrics_page(), end="")
