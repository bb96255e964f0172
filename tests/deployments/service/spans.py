"""Collects traces in the protocol of OpenTelemetry."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    name: str
    trace: bytes
    id: bytes
    parent: bytes


@dataclass
class Spans:
    url: str
    exported: list[Span] = field(default_factory=list)
    _responds: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """During the block, requests get no response."""
        self._responds.clear()
        try:
            yield
        finally:
            self._responds.set()

    @classmethod
    @contextmanager
    def collected(cls) -> Iterator["Spans"]:
        class Collector(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if not spans._responds.is_set():
                    spans._responds.wait()
                    self.close_connection = True
                    return
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        for span in scope.spans:
                            spans.exported.append(Span(span.name, span.trace_id, span.span_id, span.parent_span_id))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
            spans = cls(f"http://127.0.0.1:{server.server_port}")
            spans._responds.set()
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield spans
            finally:
                server.shutdown()
