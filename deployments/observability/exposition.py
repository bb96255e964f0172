"""The content of /metrics: the metrics of all replicas on one page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector


@dataclass(frozen=True)
class ReplicaLabels:
    """The labels that Ray adds to the metrics of a replica when it exports them."""

    application: str
    deployment: str
    replica: str


@dataclass(frozen=True)
class ReplicaMetrics:
    """The metrics of one replica."""

    labels: ReplicaLabels
    families: Sequence[Family]


def encode_metrics(replicas: Sequence[ReplicaMetrics], accept: str) -> tuple[bytes, str]:
    """Returns the encoded metrics and their content type.

    The `Accept` header of the request selects the format.
    """
    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # the requested version is not a number; the plain text format is more useful than an error
        encode, content_type = choose_encoder("")
    return encode(_MergedCollector(replicas)), content_type


class _MergedCollector(Collector):
    def __init__(self, replicas: Sequence[ReplicaMetrics]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Family]:
        """Yields each family once, with the series of all replicas.

        The labels of the series tell the replicas apart.
        """
        merged: dict[str, Family] = {}
        for replica in self._replicas:
            labels = vars(replica.labels)
            for family in replica.families:
                merged_family = merged.setdefault(family.name, Family(family.name, family.documentation, family.type))
                merged_family.samples += [
                    sample._replace(labels={**sample.labels, **labels}) for sample in family.samples
                ]
        yield from merged.values()
