"""The kinds of metrics, each of which can be created for Ray and for a registry of this process."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar, overload

import prometheus_client as prometheus
from ray import serve

RAY_METRICS: Any = serve.metrics  # Any, because its type hints allow only one label

Labels = Mapping[str, tuple[str, ...]]
NO_LABELS: Labels = {}


@dataclass(frozen=True)
class Counter:
    name: str
    help: str
    labels: Labels = field(default_factory=dict)

    def create_local(self, registry: prometheus.CollectorRegistry) -> prometheus.Counter:
        counter = prometheus.Counter(self.name, self.help, tuple(self.labels), registry=registry)
        if self.labels:
            for labels in self._label_combinations():
                counter.labels(**labels)
        return counter

    def create_in_ray(self) -> Any:
        counter = RAY_METRICS.Counter(self.name, self.help, tuple(self.labels))
        for labels in self._label_combinations():
            counter._record(0.0, labels)  # `inc` rejects zero
        return counter

    def _label_combinations(self) -> Iterator[dict[str, str]]:
        """Yields all combinations of label values.

        Every series starts at zero. Otherwise rate() would miss its first event.
        """
        return (dict(zip(self.labels, values, strict=True)) for values in product(*self.labels.values()))


@dataclass(frozen=True)
class Gauge:
    name: str
    help: str
    labels: Labels = field(default_factory=dict)

    def create_local(self, registry: prometheus.CollectorRegistry) -> prometheus.Gauge:
        return prometheus.Gauge(self.name, self.help, tuple(self.labels), registry=registry)

    def create_in_ray(self) -> Any:
        return RAY_METRICS.Gauge(self.name, self.help, tuple(self.labels))


@dataclass(frozen=True)
class Histogram:
    name: str
    help: str
    buckets: Sequence[float]
    labels: Labels = field(default_factory=dict)

    def create_local(self, registry: prometheus.CollectorRegistry) -> prometheus.Histogram:
        return prometheus.Histogram(self.name, self.help, tuple(self.labels), registry=registry, buckets=self.buckets)

    def create_in_ray(self) -> Any:
        return RAY_METRICS.Histogram(self.name, self.help, list(self.buckets), tuple(self.labels))


Metric = Counter | Gauge | Histogram
MetricType = TypeVar("MetricType", bound=Metric)


class MetricGroup(Sequence[Metric]):
    """The metrics that one kind of process exports.

    Declaring a metric with a method of its group registers it.
    """

    def __init__(self) -> None:
        self._metrics: list[Metric] = []

    def counter(self, name: str, help: str, labels: Labels = NO_LABELS) -> Counter:  # noqa: A002  # its name elsewhere
        return self._register(Counter(name, help, labels))

    def gauge(self, name: str, help: str, labels: Labels = NO_LABELS) -> Gauge:  # noqa: A002
        return self._register(Gauge(name, help, labels))

    def histogram(
        self,
        name: str,
        help: str,  # noqa: A002
        buckets: Sequence[float],
        labels: Labels = NO_LABELS,
    ) -> Histogram:
        return self._register(Histogram(name, help, buckets, labels))

    def _register(self, metric: MetricType) -> MetricType:
        if any(other.name == metric.name for other in self._metrics):
            raise ValueError(f"{metric.name} is declared twice")
        self._metrics.append(metric)
        return metric

    @overload
    def __getitem__(self, index: int) -> Metric: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Metric]: ...

    def __getitem__(self, index: int | slice) -> Metric | Sequence[Metric]:
        return self._metrics[index]

    def __len__(self) -> int:
        return len(self._metrics)
