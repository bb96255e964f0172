"""The common parts of the four dashboards: variables, links and rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from cluster.grafana.panels import PROMETHEUS, Panel, Query
from cluster.prometheus.queries import View
from deployments.observability import metrics
from deployments.observability.metric_types import Histogram, Metric

TAG = "parse"
PREFIX, WINDOW = "${prefix}", "$__rate_interval"
SERVICE_VIEW = View(PREFIX, WINDOW, {"application": "$application", "mode": "$mode"})
ENGINE_VIEW = View(PREFIX, WINDOW, {"application": "$application", "deployment": "$deployment", "replica": "$replica"})
# Grafana splits each choice at " : " and trims both sides, so the first choice has an empty value.
PREFIX_CHOICES = "/metrics of the router :  ,Ray's pipeline : ray_"
SERVICE_VARIABLES, ENGINE_VARIABLES = ("application", "mode"), ("application", "deployment", "replica")


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Board:
    name: str
    title: str
    description: str
    variables: Sequence[str]
    rows: Sequence[Row]

    def built(self) -> Dashboard:
        board = (
            dashboard.Dashboard(self.title)
            .uid(f"parse-{self.name}")
            .description(self.description)
            .tags([TAG])
            .refresh("10s")
            .time("now-30m", "now")
            .timezone("browser")
            .tooltip(DashboardCursorSync.CROSSHAIR)
            .editable()
            .link(
                dashboard.DashboardLink("PARSE")
                .type(DashboardLinkType.DASHBOARDS)
                .tags([TAG])
                .include_vars(True)
                .keep_time(True)
            )
            .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
            .with_variable(
                dashboard.CustomVariable("prefix")
                .label("Metrics source")
                .values(PREFIX_CHOICES)
                .current(VariableOption(selected=True, text="/metrics of the router", value=""))
            )
        )
        for name in self.variables:
            board.with_variable(VARIABLES[name]())
        for row in self.rows:
            board.with_row(dashboard.Row(row.title))
            for panel in row.panels:
                board.with_panel(panel)
        built = board.build()
        for number, placed in enumerate(built.panels or (), start=1):
            placed.id_val = number
        return built


def _label_values_variable(name: str, label: str, metric: Metric, selector: str = "") -> dashboard.QueryVariable:
    """Returns a variable that offers all values of a label."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(PROMETHEUS)
        .query(f"label_values({PREFIX}{metric.name}{selector}, {name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(ALL)
    )


def _mode_variable() -> dashboard.CustomVariable:
    values = ",".join(metrics.MODE_LABEL["mode"])
    return (
        dashboard.CustomVariable("mode")
        .label("Mode")
        .values(values)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(ALL)
    )


ALL = VariableOption(selected=True, text="All", value="$__all")
IN_APPLICATION = '{application=~"$application"}'
VARIABLES = {
    "application": lambda: _label_values_variable("application", "Application", metrics.REQUESTS),
    "mode": _mode_variable,
    "deployment": lambda: _label_values_variable("deployment", "Model", metrics.ENGINE_STEPS, IN_APPLICATION),
    "replica": lambda: _label_values_variable(
        "replica", "Replica", metrics.ENGINE_STEPS, '{application=~"$application",deployment=~"$deployment"}'
    ),
}


def percentile_queries(
    view: View, metric: Histogram, *, percents: Sequence[int] = (50, 95, 99), condition: str = ""
) -> list[Query]:
    conditions = (condition,) if condition else ()
    return [Query(view.quantile(percent / 100, metric, *conditions), f"p{percent}") for percent in percents]
