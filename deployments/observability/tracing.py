"""OpenTelemetry: spans of answers and their stages.

Ray Serve adds its own and propagates them between replicas.

Nothing is traced unless Ray Serve is configured to: with `tracing_config` in serve_config.yaml, or by
`python -m deployments` if OTEL_EXPORTER_OTLP_ENDPOINT is set.
"""

import logging
import os
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

from parse.events import Usage

logger = logging.getLogger(__name__)

tracer = trace.get_tracer("parse")
UNTRACED_METHODS = frozenset({"alive", "capabilities", "collect_metrics", "describe"})
UNTRACED_PATHS = frozenset({"/ready", "/health", "/metrics"})
OTEL_TIMEOUT_VARIABLES = "OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"
EXPORT_TIMEOUT_S = 5.0  # half of the default; only a shutdown waits for this time


def span_attributes(usage: Usage) -> dict[str, str | int]:
    """Returns the attributes of an answer's span."""
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


def otlp() -> list[BatchSpanProcessor]:
    """Returns the span processors. Ray Serve calls this in every process that traces.

    OpenTelemetry's own environment variables name the endpoint. A thread sends the spans from a bounded queue. An
    endpoint that does not respond therefore slows down no request. OpenTelemetry would log each failed attempt to send
    spans. These lines would fill the logs, so `_SpanExporter` logs one line instead.
    """
    logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)
    timeout = None if any(name in os.environ for name in OTEL_TIMEOUT_VARIABLES) else EXPORT_TIMEOUT_S
    return [_RequestSpanProcessor(_SpanExporter(timeout=timeout))]


class _SpanExporter(OTLPSpanExporter):
    """Logs when spans begin to get lost, and when they arrive again."""

    _is_losing_spans = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        is_losing_spans = result is not SpanExportResult.SUCCESS
        if is_losing_spans and not self._is_losing_spans:
            logger.warning("%s does not accept spans; they are lost until it does", self._endpoint)
        elif self._is_losing_spans and not is_losing_spans:
            logger.warning("%s accepts spans again", self._endpoint)
        self._is_losing_spans = is_losing_spans
        return result


class _RequestSpanProcessor(BatchSpanProcessor):
    """A span processor that leaves out the service's own calls.

    The service makes them every second, and they would fill the trace store.
    """

    def on_end(self, span: ReadableSpan) -> None:
        attributes = span.attributes or {}
        route = attributes.get("route", attributes.get("http.route", ""))
        if attributes.get("call_method") not in UNTRACED_METHODS and not str(route).endswith(tuple(UNTRACED_PATHS)):
            super().on_end(span)
