"""A server of the OpenAI API that answers at once, with the report of PARSE if it is asked for a mode.

python -m tests.bench.reproduce.scripted_server PORT [fail]
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPORT = {"drafted": 10, "accepted": 8, "cached": 0, "arrived": 0.0, "stages": [], "speculation": None}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = {"data": [{"id": "scripted"}]} if self.path == "/v1/models" else {}
        self._send(200, json.dumps(body).encode(), "application/json")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mode = request.get("parse", {}).get("mode")
        if mode == "exact":
            self._send(400, b'{"error": {"message": "no mode exact", "code": "unsupported"}}', "application/json")
            return
        delta = {"choices": [{"delta": {"content": "Answer: 7"}, "finish_reason": "stop"}]}
        last = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
        if mode:
            last["parse"] = {**REPORT, "mode": mode}
        events = "".join(f"data: {json.dumps(event)}\n\n" for event in (delta, last)) + "data: [DONE]\n\n"
        self._send(200, events.encode(), "text/event-stream")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    port, *rest = sys.argv[1:]
    print("(APIServer pid=7) INFO 12-01 06:00:00 [entry.py:1] starting", flush=True)
    if rest == ["fail"]:
        print("(EngineCore pid=8) ERROR 12-01 06:00:01 [core.py:1] ValueError: No memory is left", flush=True)
        sys.exit(1)
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
