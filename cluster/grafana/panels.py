"""The types of panels that the dashboards use, and the colours of their series."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, statetimeline
from grafana_foundation_sdk.builders import timeseries as series
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deployments.observability.metrics import ENGINE_METRICS, ROUTER_METRICS

DRAFT, TARGET, REJECTED = "#2fb89d", "#9c82f5", "#e0675e"  # as in the playground
NEUTRAL, CAUTION, MUTED = "#5aa0e6", "#e3a63a", "#8a93a6"
GOOD, BAD = DRAFT, REJECTED

# A series of this name has this colour in every panel.
COLOURS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("accepted", "draft", "drafter", "Drafter", "whole", "agree", "rounds", "ok"), DRAFT),
        **dict.fromkeys(("generated", "write", "verifier", "Verifier", "off", "used"), TARGET),
        **dict.fromkeys(("rejected", "none", "disagree", "failed", "p99", "died"), REJECTED),
        **dict.fromkeys(("judge", "both", "partial", "full", "idle", "p50", "Router", "running"), NEUTRAL),
        **dict.fromkeys(("queue", "waiting", "overloaded", "p95", "exact", "busy"), CAUTION),
        **dict.fromkeys(("warm", "skipped", "left", "free", "auto", "dropped", "slots", "does_not_pay"), MUTED),
        "progressive": "#8fc46b",
        "timeout": "#d9822b",
        "unavailable": "#b5485d",
    }
)
LABEL_VALUES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        label: frozenset(
            value
            for metric in (*ROUTER_METRICS, *ENGINE_METRICS)
            for value in metric.labels.get(label, ())
            if value in COLOURS
        )
        for label in {label for metric in (*ROUTER_METRICS, *ENGINE_METRICS) for label in metric.labels}
    }
    | {"deployment": frozenset(("Router", "Drafter", "Verifier"))}
)

PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
SHARE, SECONDS, TIMES = "percentunit", "s", "suffix:x"
PER_SECOND, TOKENS_PER_SECOND, REQUESTS_PER_SECOND = "suffix: /s", "suffix: tok/s", "reqps"

Steps = Sequence[tuple[float, str]]
S = TypeVar("S", series.Panel, stat.Panel, heatmap.Panel, bargauge.Panel, statetimeline.Panel)
Panel = series.Panel | stat.Panel | heatmap.Panel | bargauge.Panel | statetimeline.Panel


@dataclass(frozen=True)
class Query:
    expression: str
    legend: str = ""

    def names(self) -> frozenset[str]:
        """Returns the names of the query's series that have their own colour."""
        label = re.fullmatch(r"\{\{(\w+)\}\}", self.legend)
        return LABEL_VALUES.get(label[1], frozenset()) if label else frozenset((self.legend,)) & COLOURS.keys()


@dataclass(frozen=True)
class PanelOptions:
    """Title, description and layout of a panel."""

    title: str
    description: str  # what the panel shows, and what a bad value means
    unit: str = "short"
    width: int = 8  # of 24
    height: int = 8


def stat_panel(
    options: PanelOptions, expression: str, steps: Steps = (), *, base_colour: str = MUTED, decimals: int | None = None
) -> Panel:
    """Returns a panel with one large number, coloured by thresholds.

    Six of them fill a row.
    """
    panel = (
        _with_options(stat.Panel(), replace(options, width=4, height=5))
        .with_target(_target(Query(expression), "A"))
        .thresholds(_thresholds(steps, base_colour))
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value("-")
    )
    return panel if decimals is None else panel.decimals(decimals)


def time_series_panel(
    options: PanelOptions,
    *queries: Query,
    stacked: bool = False,
    limit: tuple[float, str] | None = None,
    max_value: float | None = None,
) -> Panel:
    """Returns a panel with series over time. `limit` is drawn as a dashed line."""
    panel = (
        _with_options(series.Panel(), options)
        .min(0)
        .line_width(1 if stacked else 2)
        .fill_opacity(45 if stacked else 8)
        .show_points(VisibilityMode.NEVER)
        .span_nulls(False)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .calcs(["lastNotNull"])
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if max_value is not None:
        panel.max(max_value)
    if limit:
        panel.thresholds(_thresholds([limit], "transparent"))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))
    for index, query in enumerate(queries):
        panel.with_target(_target(query, chr(ord("A") + index)))
    for name in sorted(frozenset().union(*(query.names() for query in queries))):
        panel.override_by_name(name, [DynamicConfigValue("color", {"mode": "fixed", "fixedColor": COLOURS[name]})])
    return panel


def heatmap_panel(options: PanelOptions, expression: str, colour: str) -> Panel:
    """Returns a panel that shows the distribution of a histogram over time."""
    return (
        _with_options(heatmap.Panel(), options)
        .with_target(_target(Query(expression, "{{le}}"), "A").format(PromQueryFormat.HEATMAP))
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.OPACITY)
            .fill(colour)
            .scale(HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
        )
        .y_axis(heatmap.YAxisConfig().unit(options.unit))
        .cell_gap(1)
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .show_legend()
        .show_tooltip()
    )


def bar_gauge_panel(
    options: PanelOptions, query: Query, steps: Steps = (), *, base_colour: str = MUTED, max_value: float | None = None
) -> Panel:
    """Returns a panel with one bar for the current value of each series."""
    panel = (
        _with_options(bargauge.Panel(), options)
        .with_target(_target(query, "A").instant())
        .thresholds(_thresholds(steps, base_colour))
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .display_mode(BarGaugeDisplayMode.BASIC)
        .orientation(VizOrientation.VERTICAL)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .min(0)
        .no_value("-")
    )
    return panel if max_value is None else panel.max(max_value)


def state_timeline_panel(options: PanelOptions, query: Query, words: Mapping[int, tuple[str, str]]) -> Panel:
    """Returns a panel with states over time.

    `words` maps each value to its label and colour.
    """
    results = {str(value): ValueMappingResult(text=word, color=colour) for value, (word, colour) in words.items()}
    return (
        _with_options(statetimeline.Panel(), options)
        .with_target(_target(query, "A"))
        .mappings([ValueMap(options=results)])
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .show_value(VisibilityMode.NEVER)
        .merge_values(True)
        .fill_opacity(70)
        .legend(common.VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM))
    )


def _with_options(panel: S, options: PanelOptions) -> S:
    return (
        panel.title(options.title)
        .description(options.description)
        .datasource(PROMETHEUS)
        .unit(options.unit)
        .span(options.width)
        .height(options.height)
    )


def _target(query: Query, ref: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(ref).range()


def _thresholds(steps: Steps, base_colour: str) -> dashboard.ThresholdsConfig:
    thresholds = [
        Threshold(value=None, color=base_colour),
        *(Threshold(value=value, color=colour) for value, colour in steps),
    ]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(thresholds)
