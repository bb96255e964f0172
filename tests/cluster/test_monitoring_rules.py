"""Checks and tests recording rules and alerts with Prometheus' own tool."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.prometheus.__main__ import render_files
from cluster.prometheus.alerts import ALERTS
from cluster.prometheus.queries import View, parenthesized, ratio_or_zero
from deployments.config import PROJECT_ROOT
from deployments.observability import metrics
from tests.cluster.querying import RULES, needs_prometheus

TRIED = sorted((RULES / "tests").glob("*.yml"))
PAGE = (PROJECT_ROOT / "docs" / "monitoring.md").read_text()


def promtool(*arguments: str | Path) -> str:
    command = ["promtool", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_files_are_up_to_date():
    for path, text in render_files().items():
        assert path.read_text() == text, f"{path.name} is not up to date: make dashboards"


@needs_prometheus
def test_promtool_accepts_the_configuration():
    assert "2 rule files found" in promtool("check", "config", RULES / "prometheus.yml")


@needs_prometheus
def test_promtool_accepts_the_rules():
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES / "rules.yml", RULES / "alerts.yml")


@needs_prometheus
@pytest.mark.parametrize("path", TRIED, ids=lambda path: path.stem)
def test_alerts_fire_only_in_their_scenarios(path):
    promtool("test", "rules", path)


@needs_prometheus
@pytest.mark.parametrize("path", TRIED, ids=lambda path: path.stem)
def test_alerts_also_fire_for_the_series_that_ray_exports(path, tmp_path):
    text = path.read_text().replace("../", f"{RULES}/").replace("'parse_", "'ray_parse_")
    (tmp_path / path.name).write_text(text)
    promtool("test", "rules", tmp_path / path.name)


@needs_prometheus
def test_an_alert_fires_once_if_both_sources_have_series(tmp_path):
    text = (RULES / "tests" / "failures.yml").read_text().replace("../", f"{RULES}/")
    series = [line for line in text.splitlines() if "{series: 'parse_" in line]
    doubled = text.replace(
        series[0], "\n".join([*(line.replace("'parse_", "'ray_parse_") for line in series), series[0]])
    )
    (tmp_path / "doubled.yml").write_text(doubled)
    promtool("test", "rules", tmp_path / "doubled.yml")


def test_each_alert_has_a_scenario():
    texts = {path.stem: path.read_text() for path in TRIED}
    stems = {alert: re.sub(r"(?<=.)(?=[A-Z])", "_", alert.name.removeprefix("Parse")).lower() for alert in ALERTS}
    assert texts.keys() == {*stems.values(), "healthy", "quiet"}
    for alert, stem in stems.items():
        assert f'alertname="{alert.name}",severity="{alert.severity}"' in texts[stem]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_each_alert_says_what_to_do_and_names_its_documentation(alert):
    annotations = alert.rule()["annotations"]
    page, _, anchor = annotations["runbook"].partition("#")
    assert page == "docs/monitoring.md"
    heads = [line.lstrip("# ").lower() for line in PAGE.splitlines() if line.startswith("#")]
    assert anchor in heads
    assert annotations["summary"].endswith(".") and len(annotations["description"]) > 80
    assert alert.hold_time.endswith("m")


def test_the_page_describes_no_removed_alert():
    assert set(re.findall(r"^#+ (Parse\w+)$", PAGE, re.MULTILINE)) == {alert.name for alert in ALERTS}


def test_prometheus_scrapes_the_router_and_ray():
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    service = yaml.safe_load((PROJECT_ROOT / "serve_config.yaml").read_text())["http_options"]
    router, ray = config["scrape_configs"]
    assert router["static_configs"] == [{"targets": [f"{service['host']}:{service['port']}"]}]
    assert ray["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]


@pytest.mark.parametrize(
    "condition", ['mood="full"', 'mode="ful"', 'mode=~"full|of"', "mode", 'mode="full",finish="stop"']
)
def test_a_query_with_an_undeclared_name_is_rejected(condition):
    with pytest.raises(ValueError, match=r"is not declared|not a condition"):
        View().rate(metrics.DRAFT_TOKENS, condition)


def test_parentheses_are_added_only_if_needed():
    assert parenthesized("sum(a)") == "sum(a)" and parenthesized("(a + b)") == "(a + b)"
    assert parenthesized("sum by (x, y) (rate(a[5m]))") == "sum by (x, y) (rate(a[5m]))"
    assert parenthesized("sum(a) / sum(b)") == "(sum(a) / sum(b))"
    assert parenthesized("(a) + (b)") == "((a) + (b))"
    assert ratio_or_zero("sum(a)", "sum(b)") == "(sum(a) or 0 * sum(b)) / (sum(b) > 0)"
