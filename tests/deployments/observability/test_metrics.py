"""Tests the declared metrics and their export.

Prometheus' own parsers read the export.
"""

import re
from collections.abc import Iterable
from itertools import pairwise

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as plain_families

from deployments.config import PROJECT_ROOT
from deployments.observability import metrics
from deployments.observability.exposition import ReplicaLabels, ReplicaMetrics, encode_metrics
from deployments.observability.metric_types import Counter, Gauge, Histogram
from deployments.observability.metrics import ENGINE_METRICS, ROUTER_METRICS, MetricsRecorder
from deployments.observability.metrics_reference import render_metrics_page as reference_page

ALL = (*ROUTER_METRICS, *ENGINE_METRICS)
COUNTER = Counter("parse_eggs_total", "Eggs.", {"colour": ("white", "brown")})
GAUGE = Gauge("parse_hens", "Hens.")
HISTOGRAM = Histogram("parse_weight_grams", "Weights.", (40.0, 60.0))
OPEN = "application/openmetrics-text; version=1.0.0"


def values(families: Iterable) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sorted(f"{k}={v}" for k, v in sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def read_samples(recorder: MetricsRecorder) -> dict[tuple[str, tuple[str, ...]], float]:
    """Returns the samples without the labels of a replica."""
    text, _ = encode_metrics([recorder.collect()], "")
    samples = values(plain_families(text.decode()))
    own = {f"{name}={value}" for name, value in vars(recorder.replica_labels).items()}
    return {
        (name, tuple(label for label in labels if label not in own)): value for (name, labels), value in samples.items()
    }


def test_every_metric_is_exported_by_routers_or_by_engines():
    declared = [value for value in vars(metrics).values() if isinstance(value, Counter | Gauge | Histogram)]
    assert sorted(declared, key=id) == sorted(ALL, key=id)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_declarations_follow_prometheus_naming_rules(metric):
    assert re.fullmatch(r"parse(_[a-z]+)+", metric.name) and metric.help.endswith(".")
    assert isinstance(metric, Counter) == metric.name.endswith("_total")
    assert all(label.isidentifier() and values for label, values in metric.labels.items())
    assert not {"application", "deployment", "replica", "le"} & metric.labels.keys()
    if isinstance(metric, Histogram):
        assert metric.buckets[0] > 0 and all(low < high for low, high in pairwise(metric.buckets))


def test_a_metric_name_can_be_declared_only_once():
    assert len({metric.name for metric in ALL}) == len(ALL)


def test_a_label_value_that_is_not_declared_is_rejected():
    recorder = MetricsRecorder((COUNTER,), deployment="Coop")
    with pytest.raises(ValueError, match="'<b>' is not declared for colour"):
        recorder.add(COUNTER, colour="<b>")
    assert {labels for _, labels in read_samples(recorder)} == {("colour=white",), ("colour=brown",)}


def test_recorded_values_are_exported_and_counters_start_at_zero():
    recorder = MetricsRecorder((COUNTER, GAUGE, HISTOGRAM), deployment="Coop")
    assert read_samples(recorder)["parse_eggs_total", ("colour=brown",)] == 0.0
    recorder.add(COUNTER, 3, colour="white")
    recorder.add(COUNTER, 0, colour="brown")
    recorder.add(COUNTER, colour="white")
    recorder.set(GAUGE, 7)
    recorder.observe(HISTOGRAM, 50.0)
    recorder.observe(HISTOGRAM, 70.0)
    samples = read_samples(recorder)
    assert (
        samples["parse_eggs_total", ("colour=white",)] == 4.0 and samples["parse_eggs_total", ("colour=brown",)] == 0.0
    )
    assert samples["parse_hens", ()] == 7.0
    assert [samples["parse_weight_grams_bucket", (f"le={le}",)] for le in ("40.0", "60.0", "+Inf")] == [0.0, 1.0, 2.0]
    assert samples["parse_weight_grams_sum", ()] == 120.0


def test_a_counter_can_follow_a_total_that_is_counted_elsewhere():
    recorder = MetricsRecorder((COUNTER,), deployment="Coop")
    for total in (5, 5, 12):
        recorder.update_total(COUNTER, total, colour="white")
    recorder.update_total(COUNTER, 2, colour="brown")
    samples = read_samples(recorder)
    assert (samples["parse_eggs_total", ("colour=white",)], samples["parse_eggs_total", ("colour=brown",)]) == (
        12.0,
        2.0,
    )


@pytest.mark.parametrize(
    ("accept", "read"), [("", plain_families), ("text/plain", plain_families), (OPEN, open_families)]
)
def test_one_page_contains_the_series_of_all_replicas(accept, read):
    figures = []
    for replica, eggs in (("a", 1), ("b", 20)):
        recorder = MetricsRecorder((COUNTER, HISTOGRAM), deployment="Coop")
        recorder.add(COUNTER, eggs, colour="white")
        figures.append(ReplicaMetrics(ReplicaLabels("farm", "Coop", replica), recorder.collect().families))
    text, kind = encode_metrics(figures, accept)
    assert kind.startswith(accept.partition(";")[0] or "text/plain")
    families = list(read(text.decode()))
    assert sorted(family.name for family in families) == ["parse_eggs", "parse_weight_grams"]
    samples = values(families)
    for replica, eggs in (("a", 1), ("b", 20)):
        labels = tuple(sorted(["application=farm", "colour=white", "deployment=Coop", f"replica={replica}"]))
        assert samples["parse_eggs_total", labels] == eggs


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
@pytest.mark.parametrize("version", ["x", "1.x", "", "2.0.0", "9" * 5000, "\xb2"])
def test_an_unknown_format_version_gets_the_plain_text_format(kind, version):
    recorder = MetricsRecorder((COUNTER,), deployment="Coop")
    text, _ = encode_metrics([recorder.collect()], f"{kind}; version={version}")
    assert b"\nparse_eggs_total{" in text


def test_the_page_on_metrics_is_up_to_date():
    page = (PROJECT_ROOT / "docs" / "metrics.md").read_text()
    assert page == reference_page(), "python -m deployments.observability.metrics_reference > docs/metrics.md"
    assert [metric.name for metric in ALL if f"| `{metric.name}` |" not in page] == []
