"""Checks the dashboards in the repository."""

import re
from itertools import pairwise

import pytest
from grafana_foundation_sdk.models.dashboard import Dashboard

import deployments.observability.metrics
from cluster.grafana.__main__ import FOLDER, render_files
from deployments.config import PROJECT_ROOT
from deployments.observability.metric_types import Counter, Gauge, Histogram, Metric
from tests.cluster.querying import PREFIXES, dashboard_queries, dashboards, panels

BOARDS = dashboards()
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}") for name, board in BOARDS.items() for panel in panels(board)
]
DECLARED = {
    metric.name: metric
    for metric in vars(deployments.observability.metrics).values()
    if isinstance(metric, Counter | Gauge | Histogram)
}
OF_EVERY_SERIES = {"application", "deployment", "replica"}
SERIES = re.compile(r"(\w*?)(parse_[a-z_]+)(?:\{([^}]*)\})?")


def test_the_dashboards_are_up_to_date():
    for path, text in render_files().items():
        assert path.read_text() == text, f"{path.name} is not up to date: make dashboards"
    assert set(render_files()) == set(FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", BOARDS)
def test_the_dashboards_fit_grafana_s_schema(name):
    again = Dashboard.from_json(BOARDS[name])
    assert again.title == BOARDS[name]["title"]
    assert len(again.panels or ()) == len(BOARDS[name]["panels"])


@pytest.mark.parametrize("name", BOARDS)
def test_each_dashboard_links_to_the_others_with_the_same_variables(name):
    board = BOARDS[name]
    assert board["uid"] == f"parse-{name}" and board["tags"] == ["parse"] and board["refresh"] == "10s"
    (link,) = board["links"]
    assert link["tags"] == ["parse"] and link["includeVars"] and link["keepTime"]
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names[:3] == ["datasource", "prefix", "application"]


@pytest.mark.parametrize("name", BOARDS)
def test_the_choices_of_the_prefix_are_none_and_ray(name):
    (prefix,) = [variable for variable in BOARDS[name]["templating"]["list"] if variable["name"] == "prefix"]
    choices = [re.fullmatch(r"\s*(.+)\s:\s(.+)", option) for option in prefix["query"].split(",")]
    assert [option and option[2].strip() for option in choices] == list(PREFIXES)


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_describes_what_it_shows_and_which_values_are_bad(panel):
    description = panel["description"]
    assert len(description) > 60 and description.endswith(".")
    assert re.search(r"[:;,.] ", description), "one sentence on what it shows, one on what is bad"
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]


@pytest.mark.parametrize("panel", PANELS)
def test_rates_use_counters_and_grafana_s_interval(panel):
    for target in panel["targets"]:
        for window in re.findall(r"\[([$\w]+)\]", target["expr"]):
            assert window in ("$__rate_interval", "$__range", "15m", "1h")


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fill_rows_and_do_not_overlap(name):
    taken: dict[tuple[int, int], str] = {}
    rows: dict[int, int] = {}
    for panel in BOARDS[name]["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
        rows[place["y"]] = rows.get(place["y"], 0) + place["w"]
    assert set(rows.values()) == {24}
    ids = [panel["id"] for panel in BOARDS[name]["panels"]]
    assert all(before < after for before, after in pairwise(ids))


def named(expression: str) -> list[tuple[str, Metric, set[str]]]:
    """Returns prefix, metric and selecting labels of each series in a query."""
    series = []
    for prefix, name, chosen in SERIES.findall(expression):
        base = name if name in DECLARED else re.sub(r"_(bucket|sum|count)$", "", name)
        assert base in DECLARED, f"{name} is not declared"
        assert base == name or isinstance(DECLARED[base], Histogram), name
        assert base != name or not isinstance(DECLARED[base], Histogram), f"{name} is a histogram"
        series.append((prefix, DECLARED[base], set(re.findall(r"(\w+)(?:=~|!~|!=|=)", chosen))))
    return series


@pytest.mark.parametrize("prefix", PREFIXES)
def test_queries_use_only_declared_metrics_and_labels(prefix):
    for query in dashboard_queries(prefix=prefix):
        for began, metric, labels in named(query.expression):
            assert began == prefix, query
            assert labels <= OF_EVERY_SERIES | metric.labels.keys(), query


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_declared_metric_is_on_a_dashboard(prefix):
    shown = {metric.name for query in dashboard_queries(prefix=prefix) for _, metric, _ in named(query.expression)}
    assert shown == DECLARED.keys()


def test_queries_group_only_by_labels_of_their_series():
    for query in dashboard_queries():
        metrics = [metric for _, metric, _ in named(query.expression)]
        having = OF_EVERY_SERIES | {"le"} | {label for metric in metrics for label in metric.labels}
        for kept in re.findall(r"by \(([^)]*)\)", query.expression):
            assert set(kept.split(", ")) <= having, query


def test_legends_use_only_labels_of_the_result():
    for board in BOARDS.values():
        for panel in panels(board):
            for target in panel["targets"]:
                kept = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, panel["title"]


def test_a_series_has_the_same_colour_on_all_dashboards():
    colours: dict[str, set[str]] = {}
    for board in BOARDS.values():
        for panel in panels(board):
            for override in panel["fieldConfig"]["overrides"]:
                (colour_property,) = override["properties"]
                colours.setdefault(override["matcher"]["options"], set()).add(colour_property["value"]["fixedColor"])
    assert all(len(values) == 1 for values in colours.values())
    assert colours["accepted"] == colours["drafter"] != colours["generated"] == colours["verifier"]


def test_the_colours_are_those_of_the_playground():
    style = (PROJECT_ROOT / "deployments" / "playground" / "playground.css").read_text()
    for name, colour in (("accepted", "#2fb89d"), ("target", "#9c82f5"), ("rejected", "#e0675e")):
        assert re.search(rf"--{name}-line: light-dark\(#\w+, {colour}\)", style), name


def test_the_page_on_monitoring_describes_each_dashboard():
    page = (PROJECT_ROOT / "docs" / "monitoring.md").read_text()
    assert [board["title"] for board in BOARDS.values() if board["title"].removeprefix("PARSE / ") not in page] == []
