"""Writes docs/metrics.md: python -m deployments.observability.metrics_reference > docs/metrics.md"""

from collections.abc import Sequence

from deployments.observability.metrics import ENGINE_METRICS, ROUTER_METRICS, Counter, Gauge, Histogram, Metric

HEADER = """\
<!-- Made by `make docs`: change deployments/observability/metrics.py, not this file. -->

# Metrics

You can read the metrics in two places:

- `GET /metrics` of the service gathers them from all routers, drafters and verifiers, with the names below and the
  labels `application`, `deployment` and `replica`. If the API needs a key, so does this path. A replica that does not
  respond within a second is left out and counted in `parse_unreached_replicas_total`.
- Ray exports the same metrics from every node, under names that begin with `ray_`, with the same labels and Ray's own.
  Use this in a cluster: it needs no request to a router.

Dashboards, alerts and how to read them: [monitoring.md](monitoring.md). Everything is counted when a request ends, and
an answer only if it is complete, so these metrics are exactly the sums of `usage` and `parse` in the responses. Shares
are not metrics but queries, for example accepted over drafted tokens. A label takes only the values listed here.
"""


def render_metrics_page() -> str:
    return "\n".join(
        [
            HEADER,
            "## Requests and answers\n\nExported by routers.\n",
            render_metrics_table(ROUTER_METRICS),
            "## Engines\n\nExported by each replica of a drafter or verifier. The label `deployment` says which.\n",
            render_metrics_table(ENGINE_METRICS),
        ]
    )


def render_metrics_table(metrics: Sequence[Metric]) -> str:
    lines = ["| metric | kind | labels | |", "| --- | --- | --- | --- |"]
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
