"""What /metrics shows: the figures of all replicas on one page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector


@dataclass(frozen=True)
class Origin:
    """The labels that Ray's own pipeline gives to a replica's figures."""

    application: str
    deployment: str
    replica: str


@dataclass(frozen=True)
class Figures:
    """Of one replica."""

    origin: Origin
    families: Sequence[Family]


def page(figures: Sequence[Figures], accept: str) -> tuple[bytes, str]:
    """In the format that the reader prefers; and the name of that format."""
    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # the version asked for is none: what everybody reads is no worse an answer than an error
        encode, content_type = choose_encoder("")
    return encode(_Together(figures)), content_type


class _Together(Collector):
    def __init__(self, figures: Sequence[Figures]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Family]:
        """A family of the same name in several replicas is one, whose series differ in their labels."""
        together: dict[str, Family] = {}
        for one in self._figures:
            labels = vars(one.origin)
            for family in one.families:
                whole = together.setdefault(family.name, Family(family.name, family.documentation, family.type))
                whole.samples += [sample._replace(labels={**sample.labels, **labels}) for sample in family.samples]
        yield from together.values()
