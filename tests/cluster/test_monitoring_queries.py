"""Runs every query in a real Prometheus, on metrics with known values."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.monitoring import LOOPBACK
from cluster.prometheus import figures
from cluster.prometheus.queries import View
from deployments.observability import metrics
from deployments.observability.exposition import encode_metrics
from deployments.observability.metrics import MetricsRecorder
from tests.cluster.querying import (
    PREFIXES,
    QueryFailed,
    alert_conditions,
    alert_queries,
    dashboard_queries,
    needs_prometheus,
    prometheus,
    recorded_queries,
)

pytestmark = needs_prometheus
TICK_S = 0.2
HAPPENED = re.compile(r"^(?!#)(parse_\w+)(.*) (?!0\.0$)(\S+)$", re.MULTILINE)


class SimulatedService:
    """Simulated routers and engines. The same events happen in every tick."""

    def __init__(self) -> None:
        self.router = MetricsRecorder(metrics.ROUTER_METRICS, deployment="Router")
        self.engines = [MetricsRecorder(metrics.ENGINE_METRICS, deployment=name) for name in ("Drafter", "Verifier")]

    def page(self) -> bytes:
        """Returns a page with the series of both sources.

        The second source leaves out series without events.
        """
        everyone = (self.router, *self.engines)
        text = encode_metrics([meters.collect() for meters in everyone], "text/plain")[0].decode()
        by_ray = [f"ray_{name}{labels} {value}" for name, labels, value in HAPPENED.findall(text)]
        return "\n".join([text, *by_ray, ""]).encode()

    def tick(self) -> None:
        self._answer("off", times=1, target_tokens=50, write_s=0.5, total_s=0.6, queue_s=0.1)
        self._answer(
            "rounds", times=2, target_tokens=10, write_s=0.1, total_s=0.3, queue_s=0.05, accepted=40, rejected=10
        )
        self._answer("exact", times=1, target_tokens=5, write_s=7.0, total_s=9.0, queue_s=0.0, accepted=5, rejected=5)
        self._happen()
        for meters in self.engines:
            self._compute(meters)

    def _answer(
        self,
        mode: str,
        *,
        times: int,
        target_tokens: int,
        write_s: float,
        total_s: float,
        queue_s: float,
        accepted: int = 0,
        rejected: int = 0,
    ) -> None:
        tell = self.router
        for _ in range(times):
            tell.add(metrics.REQUESTS, mode=mode, outcome="ok")
            tell.add(metrics.ANSWERS, mode=mode, finish="stop")
            tell.add(metrics.DRAFT_OUTCOMES, mode=mode, verdict="partial" if accepted else "skipped")
            tell.add(metrics.PROMPT_TOKENS, 100)
            tell.add(metrics.CACHED_TOKENS, 25)
            tell.add(metrics.DRAFT_TOKENS, accepted + rejected, mode=mode)
            tell.add(metrics.ACCEPTED_TOKENS, accepted, mode=mode)
            tell.add(metrics.REJECTED_TOKENS, rejected, mode=mode)
            tell.add(metrics.TARGET_TOKENS, target_tokens, mode=mode)
            tell.observe(metrics.STAGE_SECONDS, queue_s, mode=mode, stage="queue")
            tell.observe(metrics.STAGE_SECONDS, write_s, mode=mode, stage="write")
            tell.observe(metrics.TIME_TO_FIRST_TOKEN, total_s / 2, mode=mode)
            tell.observe(metrics.INTER_TOKEN_LATENCY, 0.01, mode=mode)
            tell.observe(metrics.ANSWER_SECONDS, total_s, mode=mode)
            for on, seconds in (("queue", queue_s), ("write", write_s), ("answer", total_s)):
                tell.add(metrics.SPENT_SECONDS, seconds, on=on, mode=mode)
            if accepted:
                tell.add(metrics.VERIFICATION_ROUNDS, 2, mode=mode)
                tell.observe(metrics.ACCEPTED_SHARE, accepted / (accepted + rejected), mode=mode)
                tell.observe(metrics.ACCEPTED_PREFIX_LENGTH, accepted, mode=mode)

    def _happen(self) -> None:
        tell = self.router
        tell.observe(metrics.CORRECT_PROBABILITY, 0.98, kept="yes")
        tell.observe(metrics.CORRECT_PROBABILITY, 0.03, kept="no")
        tell.observe(metrics.ANSWER_MASS, 0.9)
        for part, seconds in (("drafter", 0.06), ("verifier", 0.1), ("both", 0.04)):
            tell.add(metrics.BUSY_SECONDS, seconds, part=part)
        for gauge, value in ((metrics.ANSWERS_RUNNING, 6), (metrics.ANSWER_SLOTS, 8), (metrics.REQUESTS_WAITING, 2)):
            tell.set(gauge, value)
        tell.set(metrics.PART_UNAVAILABLE, 1, part="drafter")
        tell.set(metrics.PART_UNAVAILABLE, 0, part="verifier")
        tell.add(metrics.REQUESTS, mode="rounds", outcome="timeout")
        tell.add(metrics.REQUESTS, mode="unknown", outcome="invalid")
        tell.add(metrics.RETRIES, cause="died")
        tell.add(metrics.FALLBACKS, cause="busy")
        tell.add(metrics.CANCELLATIONS, cause="timeout")
        tell.add(metrics.PROPOSED_TOKENS, 10, method="draft", position="1")
        tell.add(metrics.ACCEPTED_PROPOSED_TOKENS, 5, method="draft", position="1")
        tell.add(metrics.TARGET_PASSES, 4, method="parallel")
        tell.add(metrics.TARGET_PASS_TOKENS, 14, method="parallel")
        for position, accepted in (("1", 4), ("12", 1)):
            tell.add(metrics.PROPOSED_TOKENS, 4, method="parallel", position=position)
            tell.add(metrics.ACCEPTED_PROPOSED_TOKENS, accepted, method="parallel", position=position)
        tell.add(metrics.AUDITS, 3, result="agree")
        tell.add(metrics.AUDITS, 1, result="disagree")
        tell.observe(metrics.AUDIT_GAP, 0.2)
        tell.add(metrics.UNREACHED_REPLICAS, part="Verifier")

    @staticmethod
    def _compute(tell: MetricsRecorder) -> None:
        tell.set(metrics.ENGINE_REQUESTS_RUNNING, 3)
        tell.set(metrics.ENGINE_REQUESTS_WAITING, 1)
        for state, num_blocks in (("used", 60), ("idle", 30), ("free", 10)):
            tell.set(metrics.ENGINE_KV_CACHE_BLOCKS, num_blocks, state=state)
        tell.add(metrics.ENGINE_STEPS, 10)
        tell.add(metrics.ENGINE_STEP_REQUESTS, 25)
        tell.add(metrics.ENGINE_TOKENS, 400)
        tell.add(metrics.ENGINE_BUSY_SECONDS, 0.1)
        tell.add(metrics.ENGINE_PREFIX_CACHE_QUERIES, 100)
        tell.add(metrics.ENGINE_PREFIX_CACHE_HITS, 40)
        tell.add(metrics.ENGINE_EVICTIONS, 2)
        tell.set(metrics.ENGINE_SERVERS, 2, state="responding")
        tell.set(metrics.ENGINE_SERVERS, 0, state="failing")
        tell.add(metrics.ENGINE_SERVER_RESTARTS, 1)
        tell.add(metrics.ENGINE_PROPOSED_TOKENS, 30)
        tell.add(metrics.ENGINE_ACCEPTED_TOKENS, 20)


@contextmanager
def served(service: SimulatedService) -> Iterator[str]:
    """host:port"""
    lock, over = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:  # a scrape must see a complete tick
                body = service.page()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    def live() -> None:
        while not over.wait(TICK_S):
            with lock:
                service.tick()

    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as server:
        threads = [threading.Thread(target=server.serve_forever), threading.Thread(target=live)]
        for thread in threads:
            thread.start()
        try:
            yield f"{LOOPBACK}:{server.server_address[1]}"
        finally:
            over.set()
            server.shutdown()
            for thread in threads:
                thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    service = SimulatedService()
    service.tick()
    with served(service) as target, prometheus(tmp_path_factory.mktemp("prometheus"), target) as prometheus_server:
        until = time.monotonic() + 30
        while not prometheus_server.has_data("application:parse_speed_up:ratio_rate5m"):
            assert time.monotonic() < until, prometheus_server.targets()
            time.sleep(0.2)
        yield prometheus_server


EVERYTHING = {prefix: [*dashboard_queries(prefix=prefix), *recorded_queries(prefix=prefix)] for prefix in PREFIXES}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_query_returns_data(server, prefix):
    assert server.without_data(EVERYTHING[prefix], within_s=10) == []


def test_every_alert_query_can_be_evaluated(server):
    assert server.without_data(alert_queries(), within_s=10) == []
    for one in alert_conditions():
        server.query(one.expression)
    assert server.rule_faults() == []


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        # The target needs 0.7 s for 70 tokens, so 10 ms per token. 150 tokens took 1 s without queueing.
        (figures.speed_up, 1.5),
        (lambda view: figures.speed_up(view, figures.VERIFIED_MODES), 2.0),
        (figures.accepted_share, 85 / 110),
        (lambda view: figures.accepted_share(view, figures.VERIFIED_MODES), 0.8),
        (figures.overlap_share, 1 / 3),
        (figures.failure_share, 1 / 5),
        (figures.waiting_ratio, 0.25),
        (figures.slots_in_use, 0.75),
        (figures.fallback_share, 1 / 4),
        (figures.disagreement_share, 1 / 4),
        (figures.batch_size, 2.5),
        (figures.cache_hit_share, 0.4),
        (figures.tokens_per_pass, 3.5),
        (figures.cached_prompt_share, 0.25),
        (lambda view: figures.kv_block_share(view, "used"), 0.6),
        (lambda view: figures.draft_outcome_share(view, "partial"), 1.0),
        (lambda view: figures.draft_outcome_share(view, "whole"), 0.0),
        (lambda view: view.mean(metrics.AUDIT_GAP), 0.2),
    ],
)
def test_figures_have_the_expected_values(server, prefix, figure, expected):
    (series,) = server.query(figure(View(prefix, "1m")))
    assert float(series["value"][1]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_speed_up_by_mode(server, prefix):
    result = server.query(figures.speed_up(View(prefix, "1m"), by=("mode",)))
    gains = {series["metric"]["mode"]: float(series["value"][1]) for series in result}
    assert {mode: gain for mode, gain in gains.items() if gain == gain} == pytest.approx({"off": 1.0, "rounds": 2.0})


@pytest.mark.parametrize("prefix", PREFIXES)
def test_proposals_are_counted_by_method_and_position(server, prefix):
    view = View(prefix, "1m")
    shares = {
        series["metric"]["method"]: float(series["value"][1])
        for series in server.query(figures.proposals_accepted(view, by=("method",)))
    }
    assert {method: share for method, share in shares.items() if share == share} == pytest.approx(
        {"draft": 0.5, "parallel": 5 / 8}
    )
    for condition, expected in (
        (figures.DRAFT_PROPOSALS, {"01": 0.5}),
        (figures.METHOD_PROPOSALS, {"01": 1.0, "12": 0.25}),
    ):
        result = server.query(figures.acceptance_by_position(view, condition))
        shares = {series["metric"]["position"]: float(series["value"][1]) for series in result}
        assert {position: share for position, share in shares.items() if share == share} == pytest.approx(expected)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_time_per_token_does_not_depend_on_the_selected_mode(server, prefix):
    chosen = View(prefix, "1m", {"mode": "rounds"})
    (series,) = server.query(figures.speed_up(chosen))
    assert float(series["value"][1]) == pytest.approx(2.0)


def test_an_invalid_query_is_rejected(server):
    with pytest.raises(QueryFailed, match="parse error"):
        server.query("sum(rate(")
