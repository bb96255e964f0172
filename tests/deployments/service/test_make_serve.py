"""The command of `make serve` with the shipped configuration and traces, on another port, until Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from deployments.__main__ import DEFAULT_CONFIG
from parse.demo import EXAMPLE_PROMPT
from tests.deployments.service.service_client import free_port
from tests.test_project_files import commands_of

PATIENCE_S = 180
CLIENT_TRACE, CLIENT_SPAN = bytes(range(1, 17)), bytes(range(1, 9))


def children(pid):
    """Returns the ids of all processes that descend from a process."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listed.splitlines())}
    descendants = {pid}
    while added := {child for child, parent in parents.items() if parent in descendants} - descendants:
        descendants |= added
    return descendants - {pid}


def parents_in_trace(spans, trace):
    """Returns the parent of each span in a trace, by the first word of the span's name."""
    return {span.name.split()[0]: span.parent for span in spans.exported if span.trace == trace}


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def config(tmp_path):
    """The shipped configuration on a free port."""
    settings = yaml.safe_load(DEFAULT_CONFIG.read_text())
    settings["http_options"]["port"] = free_port()
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path, f"http://127.0.0.1:{settings['http_options']['port']}"


@pytest.mark.timeout(2 * PATIENCE_S)
def test_the_shipped_configuration_serves_until_ctrl_c(config, spans):
    path, url = config
    assert commands_of("serve") == [".venv/bin/python -m deployments"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL", "RAY_ADDRESS"))}
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": spans.url, "OTEL_BSP_SCHEDULE_DELAY": "500"}
    server = subprocess.Popen(
        [sys.executable, "-m", "deployments", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        assert server.stdout is not None
        shown = ""
        for line in server.stdout:
            shown += line
            if "Press Ctrl-C" in line:
                break
        assert "Ready." in shown and url in shown, shown
        models = httpx.get(f"{url}/v1/models", timeout=30).json()["data"]
        assert models[0]["parse"]["methods"] == ["parallel", "eagle3", "space", "draft_model", "ngram", "none"]
        body = {"model": models[0]["id"], "messages": [{"role": "user", "content": EXAMPLE_PROMPT}], "temperature": 0}
        headers = {"traceparent": f"00-{CLIENT_TRACE.hex()}-{CLIENT_SPAN.hex()}-01"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60).json()
        assert "80" in answer["choices"][0]["message"]["content"] and answer["parse"]["accepted"] > 0
        wait_until(lambda: {"proxy_http_request", "answer"} <= parents_in_trace(spans, CLIENT_TRACE).keys())
        assert parents_in_trace(spans, CLIENT_TRACE)["proxy_http_request"] == CLIENT_SPAN  # in the client's trace
        started = children(server.pid)
        assert len(started) > 5
        with spans.hanging():  # the service ends although it cannot send its last spans
            server.send_signal(signal.SIGINT)
            assert server.wait(PATIENCE_S) == 0
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    finally:
        if server.poll() is None:
            server.kill()
