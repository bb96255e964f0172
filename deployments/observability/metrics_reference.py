"""Writes docs/metrics.md: python -m deployments.observability.metrics_reference > docs/metrics.md"""

from collections.abc import Sequence

from deployments.observability.metrics import ENGINE_METRICS, ROUTER_METRICS, Counter, Gauge, Histogram, Metric

HEADER = """\
<!-- Made by `make docs`: change deployments/observability/metrics.py, not this file. -->

# Metrics

Every figure leaves the service on two ways:

- `GET /metrics` of the service gathers them from all routers, drafters and verifiers, with the names below and the
  labels `application`, `deployment` and `replica`. Where the API needs a key, so does this. Whoever does not answer
  within a second is left out, and counted in `parse_unreached_replicas_total`.
- Ray's own pipeline exports the same from every node, under names that begin with `ray_`, with the same labels and
  Ray's own. That is the way for a cluster: it needs no request to a router.

Dashboards, alerts and how to read them: [monitoring.md](monitoring.md). Everything is counted when a request ends, and
an answer only if it was given to its end: what clients were told in `usage` and `parse` adds up to exactly these
figures. Shares are no metrics but queries: accepted over drafted tokens, for example. Labels take the values that stand
here and no others.
"""


def render_metrics_page() -> str:
    return "\n".join(
        [
            HEADER,
            "## Of requests and answers\n\nTold by routers.\n",
            render_metrics_table(ROUTER_METRICS),
            "## Of engines\n\nTold by each replica of a drafter or verifier: the label `deployment` says which.\n",
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
