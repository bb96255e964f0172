"""Builds PromQL queries over the declared metrics.

Dashboards, recording rules and alerts use them.

Every metric, label and value in a query has to be declared in `deployments.observability.metrics`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deployments.observability.metric_types import Counter, Gauge, Histogram, Metric

IDENTITY = ("application", "deployment", "replica")  # every series has these labels, in both sources
CONDITION = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')


@dataclass(frozen=True)
class View:
    """The common part of several queries.

    It is the source of the series, a filter, the window of rates, and the labels to group by.
    """

    prefix: str = ""
    window: str = "5m"
    where: Mapping[str, str] = field(default_factory=dict)  # label -> pattern; applies to metrics that have the label
    by: tuple[str, ...] = ()

    def without(self, label: str) -> "View":
        return replace(self, where={name: value for name, value in self.where.items() if name != label})

    def over(self, window: str) -> "View":
        return replace(self, window=window)

    def series(self, metric: Metric, *conditions: str, suffix: str = "") -> str:
        for condition in conditions:
            _check_condition(metric, condition)
        labels = (*IDENTITY, *metric.labels)
        matchers = [f'{label}=~"{value}"' for label, value in self.where.items() if label in labels]
        selector = ",".join([*matchers, *conditions])
        return f"{self.prefix}{metric.name}{suffix}" + (f"{{{selector}}}" if selector else "")

    def aggregated(self, operator: str, inner: str, by: tuple[str, ...] = ()) -> str:
        labels = tuple(dict.fromkeys((*self.by, *by)))
        return f"{operator} by ({', '.join(labels)}) ({inner})" if labels else f"{operator}({inner})"

    def rate(self, metric: Counter, *conditions: str, by: tuple[str, ...] = ()) -> str:
        return self.aggregated("sum", f"rate({self.series(metric, *conditions)}[{self.window}])", by)

    def increase(self, metric: Counter, *conditions: str, by: tuple[str, ...] = ()) -> str:
        return self.aggregated("sum", f"increase({self.series(metric, *conditions)}[{self.window}])", by)

    def total(self, metric: Histogram, *conditions: str, by: tuple[str, ...] = ()) -> str:
        """Returns the sum of the observed values, per second."""
        return self.aggregated("sum", f"rate({self.series(metric, *conditions, suffix='_sum')}[{self.window}])", by)

    def count(self, metric: Histogram, *conditions: str, by: tuple[str, ...] = ()) -> str:
        """Returns the number of observations, per second."""
        return self.aggregated("sum", f"rate({self.series(metric, *conditions, suffix='_count')}[{self.window}])", by)

    def mean(self, metric: Histogram, *conditions: str, by: tuple[str, ...] = ()) -> str:
        return ratio(self.total(metric, *conditions, by=by), self.count(metric, *conditions, by=by))

    def buckets(self, metric: Histogram, *conditions: str, by: tuple[str, ...] = ()) -> str:
        inner = f"rate({self.series(metric, *conditions, suffix='_bucket')}[{self.window}])"
        return self.aggregated("sum", inner, (*by, "le"))

    def quantile(self, q: float, metric: Histogram, *conditions: str, by: tuple[str, ...] = ()) -> str:
        return f"histogram_quantile({q}, {self.buckets(metric, *conditions, by=by)})"

    def gauge(self, metric: Gauge, *conditions: str, by: tuple[str, ...] = (), operator: str = "sum") -> str:
        return self.aggregated(operator, self.series(metric, *conditions), by)


def _check_condition(metric: Metric, condition: str) -> None:
    match = CONDITION.fullmatch(condition)
    if not match:
        raise ValueError(f'{condition}: not a condition such as label="value"')
    label, operator, value = match.groups()
    declared = metric.labels.get(label, ())
    for alternative in value.split("|") if "~" in operator else (value,):
        if alternative not in declared:
            raise ValueError(f"{metric.name}: {condition}: {alternative} is not declared for {label}")


def ratio(part: str, total: str) -> str:
    """Returns part / total, which has no value if the total is zero.

    A service without traffic is neither good nor bad.
    """
    return f"{parenthesized(part)} / ({total} > 0)"


def or_zero(part: str, total: str) -> str:
    """Returns the part, or zero if only the total has a series.

    An exporter may omit a series for events that have never happened.
    """
    return f"({part} or 0 * {parenthesized(total)})"


def ratio_or_zero(part: str, total: str) -> str:
    return ratio(or_zero(part, total), total)


def parenthesized(expression: str) -> str:
    """Returns the expression in parentheses, unless it is a single call."""
    plain = re.fullmatch(r"[\w:]+( by \([\w, ]+\) )?\(.*\)", expression, re.DOTALL)
    return expression if (plain or expression.startswith("(")) and _is_one_call(expression) else f"({expression})"


def _is_one_call(expression: str) -> bool:
    """Returns whether the expression is one function call, apart from `by (...)`."""
    call = re.sub(r"^[\w:]+ by \([\w, ]+\) ", "", expression)
    depth = 0
    for index, letter in enumerate(call):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0 and letter == ")":
            return index == len(call) - 1
    return False
