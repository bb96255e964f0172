"""Reads the queries of dashboards and alerts, and runs them in a real Prometheus."""

import json
import math
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from cluster.grafana.__main__ import FOLDER
from cluster.monitoring import LOOPBACK, Program, RunningProgram
from cluster.prometheus.alerts import ALERTS
from cluster.prometheus.rules import rules
from deployments.config import PROJECT_ROOT

RULES = PROJECT_ROOT / "cluster" / "prometheus"
PREFIXES = ("", "ray_")

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not installed: `make tools`, or apt-get install prometheus",
)


@dataclass(frozen=True)
class LabeledQuery:
    """A query, and the panel, rule or alert that it belongs to."""

    label: str
    expression: str

    def __str__(self) -> str:
        return self.label


def dashboards() -> dict[str, Any]:
    """Returns the dashboards in the repository."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def replaced(expression: str, *, prefix: str, rate_interval: str, shown: str) -> str:
    """Replaces the variables as Grafana does if all values are selected."""
    for name, value in (
        ("${prefix}", prefix),
        ("$__rate_interval", rate_interval),
        ("$__range", shown),
        ("$application", ".*"),
        ("$deployment", ".*"),
        ("$replica", ".*"),
        ("$mode", ".*"),
    ):
        expression = expression.replace(name, value)
    assert "$" not in expression.replace('"0$1"', ""), expression  # an argument of label_replace
    return expression


def dashboard_queries(*, prefix: str = "", rate_interval: str = "1m", shown: str = "15m") -> list[LabeledQuery]:
    return [
        LabeledQuery(
            f"{name}: {panel['title']} {target['refId']}",
            replaced(target["expr"], prefix=prefix, rate_interval=rate_interval, shown=shown),
        )
        for name, dashboard in dashboards().items()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def recorded_queries(*, prefix: str = "") -> list[LabeledQuery]:
    """Returns the recording rules, each with its expression."""
    (group,) = [group for group in rules()["groups"] if group["name"] == f"parse-{'ray' if prefix else 'router'}"]
    return [LabeledQuery(rule["record"], rule["expr"]) for rule in group["rules"]]


def alert_queries() -> list[LabeledQuery]:
    """Returns the queries of the alerts, without their comparisons.

    They use recorded series, which exist for both prefixes.
    """
    return [LabeledQuery(alert.name, alert.expression) for alert in ALERTS]


def alert_conditions() -> list[LabeledQuery]:
    return [LabeledQuery(alert.name, alert.expr) for alert in ALERTS]


class QueryFailed(AssertionError):
    """Raised if Prometheus rejects a query. The message is that of Prometheus."""


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Returns the current series, each with `metric` and `value`."""
        return list(self._get("/api/v1/query", query=expression)["result"])

    def has_data(self, expression: str) -> bool:
        """Returns whether a series has a number. A division by zero gives none."""
        return any(not math.isnan(float(series["value"][1])) for series in self.query(expression))

    def without_data(self, queries: Sequence[LabeledQuery], *, within_s: float) -> list[LabeledQuery]:
        """Returns the queries that had no data before the timeout.

        Each query is repeated until it has data.
        """
        until = time.monotonic() + within_s
        missing = list(queries)
        while True:
            missing = [one for one in missing if not self.has_data(one.expression)]
            if not missing or time.monotonic() > until:
                return missing
            time.sleep(0.5)

    def firing(self) -> set[str]:
        return {series["metric"]["alertname"] for series in self.query('ALERTS{alertstate="firing"}')}

    def targets(self) -> list[dict[str, Any]]:
        return list(self._get("/api/v1/targets")["activeTargets"])

    def rule_faults(self) -> list[str]:
        """Returns the errors of the last evaluation of recording rules and alerts."""
        groups = self._get("/api/v1/rules")["groups"]
        evaluated = [rule for group in groups for rule in group["rules"]]
        return [f"{rule['name']}: {rule['lastError']}" for rule in evaluated if rule.get("lastError")]

    def _get(self, path: str, **parameters: str) -> Any:
        try:
            with urlopen(f"{self.url}{path}?{urlencode(parameters)}", timeout=10) as response:
                answer = json.load(response)
        except HTTPError as error:
            raise QueryFailed(f"{parameters}: {error.read().decode()}") from error
        assert answer["status"] == "success", answer
        return answer["data"]


@contextmanager
def prometheus(
    folder: Path,
    *targets: str,
    discovery: Path | None = None,
    interval: str = "1s",
    key: str | None = None,
) -> Iterator[Prometheus]:
    """Runs a real Prometheus with this project's rules and alerts.

    It scrapes /metrics of the targets (host:port), and those of Ray's service discovery file.
    """
    scrape_configs: list[dict[str, Any]] = []
    if targets:
        credentials = {"authorization": {"credentials": key}} if key else {}
        scrape_configs.append({"job_name": "parse", "static_configs": [{"targets": list(targets)}], **credentials})
    if discovery:
        scrape_configs.append(
            {"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "1s"}]}
        )
    config = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": "1s"},
        "rule_files": [str(RULES / "rules.yml"), str(RULES / "alerts.yml")],
        "scrape_configs": scrape_configs,
    }
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    executable = shutil.which("prometheus")
    assert executable, "see needs_prometheus"
    with socket.socket() as free_socket:
        free_socket.bind((LOOPBACK, 0))
        port = free_socket.getsockname()[1]
    command = [
        executable,
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={LOOPBACK}:{port}",
        "--log.level=warn",
    ]
    program = Program("Prometheus", command, f"http://{LOOPBACK}:{port}", "/-/ready", folder / "prometheus.log")
    with RunningProgram(program):
        yield Prometheus(program.url)
