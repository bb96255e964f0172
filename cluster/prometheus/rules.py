"""Recording rules: the figures of an application.

A figure has the same name for both sources of its series.

The label `source` names the source, `router` or `ray`. Alerts use these rules, and dashboards do not.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cluster.prometheus import figures
from cluster.prometheus.queries import View
from deployments.observability import metrics

SOURCES: Mapping[str, str] = MappingProxyType({"router": "", "ray": "ray_"})  # source: prefix of its metric names
APPLICATION = ("application",)

RECORDS: Mapping[str, Callable[[View], str]] = MappingProxyType(
    {
        "application:parse_requests:rate5m": lambda view: view.rate(metrics.REQUESTS),
        "application:parse_failures:ratio_rate5m": figures.failure_share,
        "application:parse_answer_tokens:rate5m": lambda view: figures.answer_tokens(view, ""),
        "application:parse_accepted:ratio_rate5m": figures.accepted_share,
        "application:parse_judged_tokens:rate5m": lambda view: view.rate(metrics.DRAFT_TOKENS, figures.VERIFIED_MODES),
        "application:parse_judged_accepted:ratio_rate5m": lambda view: figures.accepted_share(
            view, figures.VERIFIED_MODES
        ),
        "application:parse_speed_up:ratio_rate5m": figures.speed_up,
        "application:parse_judged_speed_up:ratio_rate5m": lambda view: figures.speed_up(view, figures.VERIFIED_MODES),
        "application:parse_tokens_per_pass:ratio_rate5m": figures.tokens_per_pass,
        "application:parse_overlap:ratio_rate5m": figures.overlap_share,
        "application:parse_fallbacks:ratio_rate5m": figures.fallback_share,
        "application:parse_answer_seconds:p95_5m": lambda view: view.quantile(0.95, metrics.ANSWER_SECONDS),
        "application:parse_first_token_seconds:p95_5m": lambda view: view.quantile(0.95, metrics.TIME_TO_FIRST_TOKEN),
        "application:parse_waiting:ratio": figures.waiting_ratio,
        "application:parse_trouble:max": figures.trouble,
        "application:parse_lost_calls:increase15m": lambda view: figures.lost_calls(view.over("15m")),
        "application:parse_unreached_replicas:increase2m": lambda view: figures.unreached_replicas(view.over("2m")),
        "application:parse_audited:increase1h": lambda view: figures.audits(view.over("1h")),
        "application:parse_disagreement:ratio_increase1h": lambda view: figures.disagreement_share(view.over("1h")),
    }
)


def rules() -> dict[str, Any]:
    return {
        "groups": [
            {
                "name": f"parse-{source}",
                "rules": [
                    {"record": name, "expr": figure(View(prefix=prefix, by=APPLICATION)), "labels": {"source": source}}
                    for name, figure in RECORDS.items()
                ],
            }
            for source, prefix in SOURCES.items()
        ]
    }
