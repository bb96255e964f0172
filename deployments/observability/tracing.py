"""OpenTelemetry: spans of answers and their stages. Ray Serve adds its own, and carries them from replica to replica.

Nothing is traced unless Ray Serve is told to: with `tracing_config` in serve_config.yaml, or by `python -m deployments`
where OTEL_EXPORTER_OTLP_ENDPOINT is set.
"""

import logging
import os

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from parse.protocol import Usage

tracer = trace.get_tracer("parse")
UNTRACED_METHODS = frozenset({"alive", "collect_metrics", "describe"})
UNTRACED_PATHS = frozenset({"/ready", "/health", "/metrics"})
OTEL_TIMEOUT_VARIABLES = "OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"
EXPORT_TIMEOUT_S = 5.0  # half of what it would be; nobody waits for it but who shuts down


def span_attributes(usage: Usage) -> dict[str, str | int]:
    """What a span of an answer says of it."""
    counts = {
        "drafted": usage.draft_tokens,
        "accepted": usage.accepted_tokens,
        "written": usage.target_tokens,
        "rounds": usage.rounds,
        "cached": usage.cached_tokens,
    }
    if usage.speculation:
        counts["passes"] = usage.speculation.passes
    method = usage.speculation.method if usage.speculation else "none"
    attributes: dict[str, str | int] = {"parse.mode": usage.mode, "parse.speculation": method}
    return attributes | {f"parse.{name}": count for name, count in counts.items()}


def otlp() -> list[SpanProcessor]:
    """What Ray Serve calls in every process that traces. Where to send it stands in OpenTelemetry's own variables.

    Spans are sent by a thread, from a queue that drops what it has no room for: an endpoint that does not answer costs
    no request anything. Nor should it fill the logs.
    """
    logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)
    timeout = None if any(name in os.environ for name in OTEL_TIMEOUT_VARIABLES) else EXPORT_TIMEOUT_S
    return [_RequestSpanProcessor(OTLPSpanExporter(timeout=timeout))]


class _RequestSpanProcessor(BatchSpanProcessor):
    """What the service asks of itself every second would fill the store of traces."""

    def on_end(self, span: ReadableSpan) -> None:
        attributes = span.attributes or {}
        route = attributes.get("route", attributes.get("http.route", ""))
        if attributes.get("call_method") not in UNTRACED_METHODS and not str(route).endswith(tuple(UNTRACED_PATHS)):
            super().on_end(span)
