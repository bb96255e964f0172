"""What /metrics shows: the figures of all replicas on one page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector


@dataclass(frozen=True)
class ReplicaLabels:
    """The labels that Ray's own pipeline gives to a replica's figures."""

    application: str
    deployment: str
    replica: str


@dataclass(frozen=True)
class ReplicaMetrics:
    """Of one replica."""

    labels: ReplicaLabels
    families: Sequence[Family]


def encode_metrics(replicas: Sequence[ReplicaMetrics], accept: str) -> tuple[bytes, str]:
    """In the format that the reader prefers; and the name of that format."""
    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # the version asked for is none: what everybody reads is no worse an answer than an error
        encode, content_type = choose_encoder("")
    return encode(_MergedCollector(replicas)), content_type


class _MergedCollector(Collector):
    def __init__(self, replicas: Sequence[ReplicaMetrics]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Family]:
        """A family of the same name in several replicas is one, whose series differ in their labels."""
        merged: dict[str, Family] = {}
        for replica in self._replicas:
            labels = vars(replica.labels)
            for family in replica.families:
                merged_family = merged.setdefault(family.name, Family(family.name, family.documentation, family.type))
                merged_family.samples += [
                    sample._replace(labels={**sample.labels, **labels}) for sample in family.samples
                ]
        yield from merged.values()
