"""The command of `make serve` with the shipped configuration, on another port, until Ctrl-C."""

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


def children(pid):
    """Returns the ids of all processes that descend from a process."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listed.splitlines())}
    descendants = {pid}
    while added := {child for child, parent in parents.items() if parent in descendants} - descendants:
        descendants |= added
    return descendants - {pid}


@pytest.fixture
def config(tmp_path):
    """The shipped configuration on a free port."""
    settings = yaml.safe_load(DEFAULT_CONFIG.read_text())
    settings["http_options"]["port"] = free_port()
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path, f"http://127.0.0.1:{settings['http_options']['port']}"


@pytest.mark.timeout(2 * PATIENCE_S)
def test_the_shipped_configuration_serves_until_ctrl_c(config):
    path, url = config
    assert commands_of("serve") == [".venv/bin/python -m deployments"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL", "RAY_ADDRESS"))}
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
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert "80" in answer["choices"][0]["message"]["content"] and answer["parse"]["accepted"] > 0
        started = children(server.pid)
        assert len(started) > 5
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE_S) == 0
        deadline = time.monotonic() + PATIENCE_S
        while (left := [pid for pid in started if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left
    finally:
        if server.poll() is None:
            server.kill()
