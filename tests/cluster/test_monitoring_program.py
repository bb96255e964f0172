"""Runs `make monitoring` and `make tools` as programs."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml

from cluster.monitoring import LOOPBACK, PROVISIONING, find_free_port, grafana_program
from deployments.config import PROJECT_ROOT
from tests.cluster.querying import needs_prometheus

TOOLS = PROJECT_ROOT / "cluster" / "tools.sh"
# A substitute for Grafana's server. It prints its settings and reports that it is healthy.
GRAFANA = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
class Well(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
Path("{report}").write_text(json.dumps({{"arguments": sys.argv[1:], "pid": os.getpid()}}))
HTTPServer((os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])), Well).serve_forever()
"""


def only_prometheus(folder: Path) -> str:
    """Returns a PATH without Grafana."""
    executable = shutil.which("prometheus")
    assert executable, "see needs_prometheus"
    (folder / "prometheus").symlink_to(executable)
    return str(folder)


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@contextmanager
def monitoring(data: Path, *arguments: str, path: str = os.environ["PATH"]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "cluster.monitoring", "--data", str(data), *arguments]
    process = subprocess.Popen(
        command,
        cwd=PROJECT_ROOT,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def output_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return "".join(lines)
    raise AssertionError(f"it has ended: {''.join(lines)} {process.stderr and process.stderr.read()}")


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@needs_prometheus
@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_monitoring_runs_until_it_is_stopped_and_leaves_no_process(tmp_path, stop_signal):
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        script(tmp_path / "grafana", GRAFANA.format(python=sys.executable, report=tmp_path / "report.json"))
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        with monitoring(tmp_path / "data", "--port", str(port), "--grafana-port", str(port), path=path) as process:
            output = output_until(process, "Press Ctrl-C")
            source, shown = re.findall(r"^(?:Prometheus|Grafana) +(\S+)", output, re.MULTILINE)
            assert not source.endswith(f":{port}"), "somebody else has that one"
            assert source != shown
            assert answers(f"{source}/-/ready") and answers(shown)
            with urlopen(f"{source}/api/v1/rules", timeout=5) as response:
                assert len(json.load(response)["data"]["groups"]) == 3
            with urlopen(f"{source}/api/v1/status/config", timeout=5) as response:
                assert "prom_metrics_service_discovery.json" in response.read().decode()
            process.send_signal(stop_signal)
            process.send_signal(signal.SIGINT)  # a second signal must not interrupt the shutdown
            rest, faults = process.communicate(timeout=30)
            assert process.returncode == 0 and rest.endswith("Stopped.\n") and not faults
        assert not answers(f"{source}/-/ready")
        stood_in = json.loads((tmp_path / "report.json").read_text())
        assert stood_in["arguments"][0] == "server" and not running(stood_in["pid"])


def test_grafana_gets_the_source_and_the_dashboards_and_is_read_only(tmp_path, monkeypatch):
    script(tmp_path / "grafana", GRAFANA.format(python=sys.executable, report=tmp_path / "report.json"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = grafana_program("http://127.0.0.1:9", tmp_path, 3)
    assert program
    settings = program.environment
    assert settings["GF_SERVER_HTTP_ADDR"] == LOOPBACK
    assert (settings["GF_AUTH_ANONYMOUS_ENABLED"], settings["GF_AUTH_ANONYMOUS_ORG_ROLE"]) == ("true", "Viewer")
    (source,) = PROVISIONING.glob("datasources/*")
    (boards,) = PROVISIONING.glob("dashboards/*")
    (datasource,) = yaml.safe_load(source.read_text())["datasources"]
    (provider,) = yaml.safe_load(boards.read_text())["providers"]
    assert settings[datasource["url"].lstrip("$")] == "http://127.0.0.1:9"
    folder = Path(settings[provider["options"]["path"].lstrip("$")])
    assert len(list(folder.glob("*.json"))) == 4


@needs_prometheus
def test_if_prometheus_does_not_start_the_reason_is_printed(tmp_path):
    (tmp_path / "wrong.yml").write_text("scrape: []")
    with monitoring(tmp_path / "data", "--config", str(tmp_path / "wrong.yml")) as process:
        _, faults = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Prometheus has ended" in faults and "field scrape not found" in faults


@needs_prometheus
def test_if_prometheus_dies_monitoring_ends(tmp_path):
    with monitoring(tmp_path / "data", path=only_prometheus(tmp_path)) as process:
        output_until(process, "Press Ctrl-C")
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        _, faults = process.communicate(timeout=30)
    assert process.returncode == 1 and "Prometheus has ended (-9)" in faults


@needs_prometheus
def test_two_programs_cannot_use_the_same_folder(tmp_path):
    path, data = only_prometheus(tmp_path), tmp_path / "with a space"
    with monitoring(data, path=path) as first:
        output_until(first, "Press Ctrl-C")
        with monitoring(data, path=path) as second:
            stdout, faults = second.communicate(timeout=30)
        assert (second.returncode, stdout) == (1, "") and f"another monitoring program already uses {data}" in faults
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=30)
    with monitoring(data, path=path) as third:
        output_until(third, "Press Ctrl-C")
        third.send_signal(signal.SIGINT)
        third.communicate(timeout=30)


@needs_prometheus
def test_requests_to_this_machine_use_no_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with monitoring(tmp_path / "data", path=only_prometheus(tmp_path)) as process:
        output_until(process, "Press Ctrl-C")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


@needs_prometheus
@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--port", "70000"), "there is no port 70000"),
        (
            ("--data", "/dev/null/there"),
            "data cannot be stored in /dev/null/there: Not a directory; set another folder (--data)",
        ),
    ],
)
def test_errors_are_printed_in_one_line(tmp_path, arguments, fault):
    with monitoring(tmp_path / "data", *arguments) as process:
        stdout, faults = process.communicate(timeout=30)
    assert (process.returncode, stdout, faults) == (1, "", f"{fault}\n")


def test_without_prometheus_the_error_says_how_to_install_it(tmp_path):
    with monitoring(tmp_path / "data", path=str(tmp_path)) as process:
        stdout, faults = process.communicate(timeout=30)
    assert process.returncode == 1 and not stdout
    assert "apt-get install --no-install-recommends prometheus" in faults


def test_a_port_in_use_is_skipped():
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        assert find_free_port(port) > port
    assert find_free_port(port) == port
    assert find_free_port(0) > 0


def tools(
    folder: Path, *, root: bool, installed: Sequence[str] = (), fails: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """Runs tools.sh on a simulated machine.

    Returns its output and its calls of apt-get.
    """
    called = folder / "called"
    failing = "|".join(f"*{word}*" for word in fails) or "nothing"
    script(folder / "id", f"#!/bin/sh\necho {0 if root else 1000}\n")
    script(folder / "timeout", '#!/bin/sh\nshift\nexec "$@"\n')
    script(folder / "apt-get", f'#!/bin/sh\necho "$@" >> {called}\ncase "$*" in {failing}) exit 100;; esac\n')
    for name in installed:
        script(folder / name, "#!/bin/sh\n")
    done = subprocess.run(
        ["/bin/sh", str(TOOLS)], env={"PATH": str(folder)}, capture_output=True, text=True, timeout=30, check=True
    )
    assert not done.stderr
    return done.stdout, called.read_text().splitlines() if called.exists() else []


ALL_THERE = ("prometheus", "promtool", "chromium", "chromedriver")


def test_installed_tools_are_not_installed_again(tmp_path):
    assert tools(tmp_path, root=True, installed=ALL_THERE) == ("", [])


def test_as_root_only_missing_tools_are_installed(tmp_path):
    stdout, called = tools(tmp_path, root=True, installed=ALL_THERE[:2])
    assert stdout == "Installing chromium chromium-driver\n"
    (call,) = called
    assert call.endswith("install --yes --no-install-recommends chromium chromium-driver") and call.startswith("-qq")


def test_package_lists_are_updated_if_a_package_is_not_found(tmp_path):
    stdout, called = tools(tmp_path, root=True, installed=ALL_THERE[2:], fails=["prometheus"])
    assert [call.split()[5] for call in called] == ["install", "update", "install"]
    assert "Without prometheus some tests are skipped" in stdout


def test_other_users_see_the_command(tmp_path):
    stdout, called = tools(tmp_path, root=False)
    assert not called
    assert re.findall(r"sudo (.*)", stdout) == [
        "apt-get install --no-install-recommends prometheus",
        "apt-get install --no-install-recommends chromium chromium-driver",
    ]
