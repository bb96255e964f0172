import logging
import socket
import time
from contextlib import contextmanager

import pytest
from opentelemetry.sdk.trace import TracerProvider

from deployments.observability.tracing import otlp, span_attributes
from parse.events import Usage
from parse.types import SpeculationStats
from tests.deployments.live import until
from tests.deployments.service.spans import Spans

LOSES_SPANS = "{}/v1/traces does not accept spans; they are lost until it does"
ACCEPTS_SPANS = "{}/v1/traces accepts spans again"


def test_the_span_of_an_answer_has_its_counts():
    usage = Usage("rounds", draft_tokens=9, accepted_tokens=4, target_tokens=10, rounds=1, cached_tokens=3)
    counts = {"drafted": 9, "accepted": 4, "written": 10, "rounds": 1, "cached": 3}
    expected = {f"parse.{name}": count for name, count in counts.items()} | {"parse.mode": "rounds"}
    assert span_attributes(usage) == expected | {"parse.speculation": "none"}
    writing = Usage("off", target_tokens=10, speculation=SpeculationStats("eagle3", 4, (4,), (3,)))
    assert (span_attributes(writing)["parse.speculation"], span_attributes(writing)["parse.passes"]) == ("eagle3", 4)


@contextmanager
def traced(monkeypatch, url, *, timeout_s=0.3):
    """Yields a tracer that sends its spans to an endpoint, and the number of attempts that ended."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(timeout_s))
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    provider, attempts = TracerProvider(shutdown_on_exit=False), []
    (processor,) = otlp()
    export = processor.span_exporter.export
    monkeypatch.setattr(processor.span_exporter, "export", lambda spans: attempts.append(export(spans)))
    provider.add_span_processor(processor)
    try:
        yield provider.get_tracer("test"), attempts
    finally:
        provider.shutdown()


def send_spans(tracer, attempts, count):
    """Ends spans until this many attempts to send some have ended."""
    end = len(attempts) + count

    def is_reached():
        tracer.start_span("answer").end()
        return len(attempts) >= end

    until(is_reached)


def messages_of_tracing(caplog):
    return [record for record in caplog.records if record.name == "deployments.observability.tracing"]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_trace_endpoint_that_fails_is_logged_once_and_does_not_delay_the_end(monkeypatch, caplog, hangs):
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it accepts connections, but never responds
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if not hangs:
            listener.close()
        with traced(monkeypatch, url) as (tracer, attempts):
            send_spans(tracer, attempts, 3)
            started = time.monotonic()
        assert time.monotonic() - started < 5
    (record,) = messages_of_tracing(caplog)
    assert (record.getMessage(), record.levelno) == (LOSES_SPANS.format(url), logging.WARNING)


def test_a_trace_endpoint_that_recovers_is_logged(monkeypatch, caplog):
    with Spans.collected() as spans, traced(monkeypatch, spans.url, timeout_s=2) as (tracer, attempts):
        send_spans(tracer, attempts, 1)
        with spans.hanging():
            send_spans(tracer, attempts, 2)
        send_spans(tracer, attempts, 2)
    assert spans.exported
    messages = [record.getMessage() for record in messages_of_tracing(caplog)]
    assert messages == [LOSES_SPANS.format(spans.url), ACCEPTS_SPANS.format(spans.url)]
