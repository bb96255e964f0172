"""OpenTelemetry: spans of answers and their stages. Ray Serve adds its own, and carries them from replica to replica.

Nothing is traced unless Ray Serve is told to: with `tracing_config` in serve_config.yaml, or by `python -m deployments`
where OTEL_EXPORTER_OTLP_ENDPOINT is set.
"""

import logging

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

tracer = trace.get_tracer("parse")
BY_ITSELF = (" alive", " figures", " describe", " GET /ready", " GET /health", " GET /metrics")  # ends of span names


def otlp() -> list[SpanProcessor]:
    """What Ray Serve calls in every process that traces. Where to send it stands in OpenTelemetry's own variables.

    Spans are sent by a thread, from a queue that drops what it has no room for: an endpoint that does not answer costs
    no request anything. Nor should it fill the logs.
    """
    logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)
    return [_OfRequests(OTLPSpanExporter(timeout=5))]


class _OfRequests(BatchSpanProcessor):
    """What the service asks of itself every second would fill the store of traces."""

    def on_end(self, span: ReadableSpan) -> None:
        if not span.name.endswith(BY_ITSELF):
            super().on_end(span)
