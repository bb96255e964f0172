"""Compares /metrics and the log with the responses that clients received."""

import json
import logging
from collections import Counter as Counts
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.api.routes import create_app
from deployments.config import ApiSettings
from deployments.observability.access_log import AccessLogMiddleware, RequestRecord
from deployments.observability.choice_state import ChoiceState
from deployments.observability.exposition import ReplicaLabels
from deployments.observability.metrics import ROUTER_METRICS, MetricsRecorder
from deployments.observability.request_metrics import record_choice_metrics
from deployments.session import Session
from parse.errors import DraftUnavailable
from parse.events import Finished, Stage, TextDelta, Usage, Verification
from parse.pair import Pair
from parse.types import SpeculationStats
from tests.deployments.conftest import MODEL
from tests.deployments.live import PATIENCE_S, LocalBackend, Writer, connected, served, until
from training.measure import draw_problems

CHAT = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "Hello."}]
MODES = ("full", "rounds", "progressive", "exact", "off", "auto")
CHOICES = (None, "ngram", "parallel", "none", None)
OWN = ReplicaLabels("local", "Router", "local")
HOSTILE = 'x"} 1\nparse_requests_total{mode="<b>"} 9\n'


@contextmanager
def serving(pair: Pair, **changes: Any) -> Iterator[httpx.Client]:
    settings = ApiSettings(**{name: changes.pop(name) for name in list(changes) if name in ApiSettings.model_fields})
    pipeline = replace(pair.pipeline, **changes)
    with (
        served(create_app(LocalBackend(pipeline), settings, MODEL)) as address,
        httpx.Client(base_url=address, timeout=PATIENCE_S) as client,
    ):
        yield client


def chat_body(content: str = "Hello.", mode: str = "off", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL, "messages": messages, "parse": {"mode": mode}} | more


def read_metrics(client: httpx.Client, **headers: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Returns all values that are not zero.

    The keys are the name and the values of the labels, in the order of the label names.
    """
    samples = {}
    for family in text_string_to_metric_families(client.get("/metrics", headers=headers).text):
        for sample in family.samples:
            labels = {
                k: v for k, v in sorted(sample.labels.items()) if k not in ("application", "deployment", "replica")
            }
            if sample.value:
                samples[sample.name, tuple(labels.values())] = sample.value
    return samples


def read_outcomes(client: httpx.Client, **headers: str) -> dict[tuple[str, ...], float]:
    """Returns the numbers of recorded requests by mode and outcome."""
    return {
        labels: count
        for (name, labels), count in read_metrics(client, **headers).items()
        if name == "parse_requests_total"
    }


def stream_report(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """Returns the report in the last chunks, and the usage."""
    chunks: dict[str, Any] = {}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", CHAT, json=body | options) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                chunks |= {name: chunk[name] for name in ("parse", "usage") if chunk.get(name)}
                for choice in chunk.get("choices", ()):
                    chunks["finish"] = choice["finish_reason"] or chunks.get("finish")
    return chunks


def test_the_metrics_equal_the_sums_of_the_responses(pair):
    expected: Counts = Counts()
    with serving(pair) as client:
        for number, problem in enumerate(draw_problems(8, 18, split="service")):
            mode = MODES[number % len(MODES)]
            body = chat_body(problem.question, mode, temperature=0, max_tokens=40 if number > 12 else None)
            body["parse"]["speculation"] = CHOICES[number % len(CHOICES)]
            if number % 12 > 5:
                response = stream_report(client, body)
                finish = response["finish"]
            else:
                response = client.post(CHAT, json=body).json()
                finish = response["choices"][0]["finish_reason"]
            report, usage = response["parse"], response["usage"]
            used_mode = report["mode"]
            expected["parse_requests_total", (mode, "ok")] += 1
            expected["parse_answers_total", (finish, used_mode)] += 1
            expected["parse_prompt_tokens_total", ()] += usage["prompt_tokens"]
            expected["parse_cached_prompt_tokens_total", ()] += usage["prompt_tokens_details"]["cached_tokens"]
            for name in ("drafted", "accepted", "rejected", "written"):
                expected[f"parse_{name}_tokens_total", (used_mode,)] += report[name]
            assert report["accepted"] + report["written"] == usage["completion_tokens"]
            expected["parse_rounds_total", (used_mode,)] += report["rounds"]
            kind = "skipped" if not report["drafted"] else "none" if not report["accepted"] else "partial"
            chunks = report["drafted"] and not report["rejected"]
            expected["parse_verdicts_total", (used_mode, "whole" if chunks else kind)] += 1
            expected["parse_first_token_seconds_count", (used_mode,)] += 1
            expected["parse_answer_seconds_count", (used_mode,)] += 1
            expected["parse_boundary_tokens_count", (used_mode,)] += report["boundary"] is not None
            expected["parse_boundary_tokens_sum", (used_mode,)] += report["boundary"] or 0
            if used_mode == "exact":
                expected["parse_proposed_tokens_total", ("draft",)] += report["drafted"]
                expected["parse_proposed_accepted_tokens_total", ("draft",)] += report["accepted"]
            if speculation := report["speculation"]:
                method = speculation["method"]
                expected["parse_target_passes_total", (method,)] += speculation["passes"]
                expected["parse_target_pass_tokens_total", (method,)] += speculation["tokens"]
                expected["parse_proposed_tokens_total", (method,)] += speculation["proposed"]
                expected["parse_proposed_accepted_tokens_total", (method,)] += speculation["accepted"]
            for stage in report["stages"]:
                expected["parse_stage_seconds_count", (used_mode, stage["name"])] += 1
        until(lambda: sum(read_outcomes(client).values()) == 18)
        samples: dict[tuple[str, tuple[str, ...]], float] = {}
        for (name, labels), count in read_metrics(client).items():
            key = name, labels[:1] if name.startswith("parse_proposed_") else labels  # the sum over all positions
            samples[key] = samples.get(key, 0.0) + count
    exact = {key: value for key, value in samples.items() if key[0] in {name for name, _ in expected}}
    assert exact == {key: value for key, value in expected.items() if value}
    assert samples["parse_inter_token_seconds_count", ("off",)] > 0
    drafted = sum(count for (name, _), count in expected.items() if name == "parse_drafted_tokens_total")
    assert all(expected["parse_target_passes_total", (method,)] for method in ("parallel", "ngram"))
    assert drafted > 500 and any(
        labels[1:] == ("partial",) for name, labels in samples if name == "parse_verdicts_total"
    )


def test_failed_requests_are_counted_by_outcome(pair):
    with serving(pair, api_keys_env="OUR_TEST_KEYS", max_body_bytes=2000) as client:
        client.post(CHAT, content=b"{")
        client.post(CHAT, json=chat_body(surprise=1))
        client.post(CHAT, json=chat_body() | {"model": HOSTILE})
        client.post(CHAT, json=chat_body(HOSTILE * 100))
        client.post(CHAT, json=chat_body(mode=HOSTILE))
        client.get(CHAT)
        client.post("/v1/nothing")
        assert read_outcomes(client) == {("unknown", "invalid"): 6}


def test_unauthorized_requests_are_counted_and_get_no_metrics(pair, monkeypatch):
    monkeypatch.setenv("OUR_TEST_KEYS", "right")
    with serving(pair, api_keys_env="OUR_TEST_KEYS") as client:
        assert client.post(CHAT, json=chat_body(), headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/metrics").status_code == 401
        key = {"Authorization": "Bearer right"}
        assert client.post(CHAT, json=chat_body(max_tokens=2), headers=key).status_code == 200
        assert read_outcomes(client, **key) == {("unknown", "unauthorized"): 1, ("off", "ok"): 1}


def test_overload_timeout_and_failure_are_separate_outcomes(pair):
    writer = Writer()
    with serving(pair, verifier=writer, drafter=None, max_answers=1, max_n=1, max_queued_requests=0) as client:
        with ThreadPoolExecutor() as beside:
            first = beside.submit(httpx.post, f"{client.base_url}{CHAT}", json=chat_body(), timeout=PATIENCE_S)
            until(lambda: writer.busy == 1)
            assert client.post(CHAT, json=chat_body()).status_code == 503
            assert read_outcomes(client) == {("off", "overloaded"): 1}
            assert read_metrics(client)["parse_answering", ()] == read_metrics(client)["parse_places", ()] == 1
            writer.may_go_on.set()
            assert first.result().status_code == 200
        until(lambda: read_outcomes(client).get(("off", "ok")) == 1)
    with serving(pair, verifier=Writer(), drafter=None, request_timeout_s=0.05) as client:
        assert client.post(CHAT, json=chat_body()).status_code == 504
        assert read_outcomes(client) == {("off", "timeout"): 1}
        assert read_metrics(client)["parse_cancellations_total", ("timeout",)] == 1
    with serving(pair, verifier=Writer(error=RuntimeError("broken")), drafter=None) as client:
        assert client.post(CHAT, json=chat_body()).status_code == 500
        assert read_outcomes(client) == {("off", "failed"): 1}
    with serving(pair, verifier=Writer((300,), error=RuntimeError("broken")), drafter=None) as client:
        assert "parse" not in stream_report(client, chat_body())
        until(lambda: read_outcomes(client) == {("off", "failed"): 1})


def test_disconnections_are_counted_by_their_time(pair):
    writer = Writer()
    with serving(pair, verifier=writer, drafter=None) as client:
        with connected(str(client.base_url), json.dumps(chat_body()).encode()):
            until(lambda: writer.busy == 1)
        until(lambda: read_outcomes(client) == {("off", "left"): 1})
        assert read_metrics(client)["parse_cancellations_total", ("left_waiting",)] == 1
    writer = Writer((300, 301))
    with serving(pair, verifier=writer, drafter=None) as client:
        with client.stream("POST", CHAT, json=chat_body(stream=True)) as response:
            next(response.iter_lines())
        until(lambda: read_outcomes(client) == {("off", "left"): 1})
        assert read_metrics(client)["parse_cancellations_total", ("left_reading",)] == 1
        assert not any(name.startswith("parse_written") for name, _ in read_metrics(client))


def test_fallbacks_are_counted_by_cause(pair):
    class Busy:
        async def draft(self, *args, **kwargs):
            raise DraftUnavailable("busy", HOSTILE)
            yield

    with serving(pair, drafter=Busy()) as client:
        report = client.post(CHAT, json=chat_body(mode="full", max_tokens=2)).json()["parse"]
        assert HOSTILE in report["fallback"]
        assert read_metrics(client)["parse_fallbacks_total", ("busy",)] == 1
        assert read_metrics(client)["parse_verdicts_total", ("full", "skipped")] == 1
    with serving(pair, drafter=None) as client:
        client.post(CHAT, json=chat_body(mode="full", max_tokens=2))
        assert read_metrics(client)["parse_fallbacks_total", ("none_there",)] == 1


def test_lost_calls_are_counted_even_if_the_request_fails():
    recorder = MetricsRecorder(ROUTER_METRICS, deployment="Router")
    record = RequestRecord(
        "id",
        "/v1/completions",
        choices=[ChoiceState(0, 5, Session("s", retry_causes=["died", "died", "stopped"]), 0.0)],
    )
    AccessLogMiddleware(cast(Any, None), recorder=recorder)._record_metrics(record)
    lost = {sample.labels["cause"]: sample.value for sample in _samples(recorder, "parse_retries_total")}
    assert lost == {"died": 2.0, "cancelled": 0.0, "stopped": 1.0, "unavailable": 0.0}


def test_a_proposal_is_counted_by_position_up_to_the_first_that_differs():
    recorder = MetricsRecorder(ROUTER_METRICS, deployment="Router")
    answer = ChoiceState(0, 5, Session("s"), 0.0)
    answer.add_event(TextDelta("a", (1, 2, 3), "draft"))
    answer.add_event(Finished("stop", Usage("exact", draft_tokens=20, accepted_tokens=3, target_tokens=4)))
    record_choice_metrics(recorder, answer)
    proposed, accepted = (
        {s.labels["position"]: s.value for s in _samples(recorder, name) if s.labels["method"] == "draft"}
        for name in ("parse_proposed_tokens_total", "parse_proposed_accepted_tokens_total")
    )
    assert proposed == {**{str(position): 1.0 for position in range(1, 17)}, "17+": 4.0}
    assert {position for position, count in accepted.items() if count} == {"1", "2", "3"} and sum(
        accepted.values()
    ) == 3


def test_proposals_are_counted_by_method_and_position_and_passes_with_their_tokens():
    recorder = MetricsRecorder(ROUTER_METRICS, deployment="Router")
    proposed, accepted = (9,) * 18, (8, 5, *[0] * 15, 2)
    speculated = SpeculationStats("eagle3", 9, proposed, accepted)
    alone = Usage("off", target_tokens=20, speculation=speculated)
    for usage in (alone, replace(alone, mode="exact", draft_tokens=4, accepted_tokens=3)):
        answer = ChoiceState(0, 5, Session("s"), 0.0)
        answer.add_event(Finished("stop", usage))
        record_choice_metrics(recorder, answer)

    def response(name: str, method: str) -> dict[str, float]:
        samples = [s for s in _samples(recorder, name) if s.labels["method"] == method and s.value]
        return {s.labels.get("position", ""): s.value for s in samples}

    assert response("parse_target_passes_total", "eagle3") == {"": 18.0}
    assert response("parse_target_pass_tokens_total", "eagle3") == {"": 20.0 + 20.0 + 3.0}
    positions = {**{str(position): 18.0 for position in range(1, 17)}, "17+": 36.0}
    assert response("parse_proposed_tokens_total", "eagle3") == positions
    assert response("parse_proposed_accepted_tokens_total", "eagle3") == {"1": 16.0, "2": 10.0, "17+": 4.0}
    assert response("parse_proposed_tokens_total", "draft") == dict.fromkeys("1234", 1.0)
    assert response("parse_proposed_accepted_tokens_total", "draft") == dict.fromkeys("123", 1.0)
    assert not response("parse_proposed_tokens_total", "parallel")


def test_the_log_line_has_the_method_and_the_tokens_per_pass(pair, caplog):
    caplog.set_level(logging.INFO, logger="deployments.observability.access_log")
    writer = Writer((300, 301, 302, 303, 304), speculated=SpeculationStats("ngram", 2, (2, 1, 1), (2, 1, 0)))
    writer.may_go_on.set()
    alone = Writer((300, 301))
    alone.may_go_on.set()
    for verifier in (writer, alone):
        with serving(pair, verifier=verifier, drafter=None) as client:
            assert client.post(CHAT, json=chat_body(n=2)).status_code == 200
    until(lambda: len([r for r in caplog.records if r.name == "deployments.observability.access_log"]) == 2)
    first, second = (vars(record) for record in caplog.records if record.name == "deployments.observability.access_log")
    assert (first["speculation"], first["tokens_per_pass"]) == (
        "ngram",
        3.0,
    )  # there are two choices with six tokens in two passes each
    assert "speculation" not in second and "tokens_per_pass" not in second


def test_p_correct_is_recorded_by_whether_the_prefix_was_kept():
    recorder = MetricsRecorder(ROUTER_METRICS, deployment="Router")
    answer = ChoiceState(0, 5, Session("s"), 0.0)
    answer.add_event(Verification(0, tuple(range(12)), (4, 8, 12), (0.99, 0.2, None), 4, "x"))
    answer.add_event(Verification(4, tuple(range(8)), (4, 8), (0.95, 0.97), 8, ""))
    answer.add_event(
        Finished("stop", Usage("rounds", draft_tokens=20, accepted_tokens=12, stages=(Stage("judge", 0.0, 0.5),)))
    )
    record_choice_metrics(recorder, answer)
    counts = {s.labels["kept"]: s.value for s in _samples(recorder, "parse_correct_probability_count")}
    sums = {s.labels["kept"]: s.value for s in _samples(recorder, "parse_correct_probability_sum")}
    assert counts == {"yes": 3.0, "no": 1.0}
    assert sums == {"yes": pytest.approx(0.99 + 0.95 + 0.97), "no": pytest.approx(0.2)}


def test_nothing_a_client_sends_becomes_a_label(pair):
    with serving(pair) as client:
        client.post(CHAT, json=chat_body(HOSTILE, max_tokens=2), headers={"X-Request-Id": "<script>"})
        client.post(CHAT, json=chat_body(HOSTILE, max_tokens=2, user="<script>", prompt_cache_key="<script>"))
        text = client.get("/metrics").text
    assert "<" not in text and text.count('mode="off",outcome="ok"') == 1
    declared = {
        (name, value) for metric in ROUTER_METRICS for name, values in metric.labels.items() for value in values
    }
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert {(k, v) for k, v in sample.labels.items() - vars(OWN).items() if k != "le"} <= declared


def test_every_request_has_an_id_and_a_log_line_without_its_text(pair, caplog):
    caplog.set_level(logging.INFO, logger="deployments.observability.access_log")
    with serving(pair) as client:
        secret = "Xylophone"
        first = client.post(CHAT, json=chat_body(secret, max_tokens=3, user=secret))
        second = client.post(CHAT, json={"bad": secret})
        third = client.post(CHAT, json=chat_body(max_tokens=2), headers={"X-Request-Id": "mine"})
        until(lambda: len([r for r in caplog.records if r.name == "deployments.observability.access_log"]) == 3)
    lines = [vars(record) for record in caplog.records if record.name == "deployments.observability.access_log"]
    ids = [first.headers["x-request-id"], second.headers["x-request-id"], "mine"]
    assert [line["request_id"] for line in lines] == ids and len(set(ids)) == 3
    assert "x-request-id" not in third.headers  # Ray Serve's proxy returns an id that the client has sent
    assert [(line["outcome"], line["status"]) for line in lines] == [("ok", 200), ("invalid", 400), ("ok", 200)]
    assert lines[0]["written"] == 3 and lines[0]["prompt_tokens"] == first.json()["usage"]["prompt_tokens"]
    assert secret not in caplog.text


def test_an_id_cannot_break_the_log_line(pair, caplog):
    caplog.set_level(logging.INFO, logger="deployments.observability.access_log")
    forged = "a outcome=failed\t\x85\xfcb" + "c" * 200
    with serving(pair) as client:
        client.post(CHAT, json={}, headers={b"X-Request-Id": forged.encode("latin-1")})
        until(lambda: any(r.name == "deployments.observability.access_log" for r in caplog.records))
    (line,) = (record for record in caplog.records if record.name == "deployments.observability.access_log")
    request_id = vars(line)["request_id"]
    assert request_id.startswith("a?outcome=failed???bc") and len(request_id) == 128
    assert line.getMessage().split()[:3] == [f"request_id={request_id}", f"path={CHAT}", "outcome=invalid"]


def test_rejected_requests_to_other_paths_are_logged_too(pair, caplog, monkeypatch):
    monkeypatch.setenv("OUR_TEST_KEYS", "right")
    caplog.set_level(logging.INFO, logger="deployments.observability.access_log")
    with serving(pair, api_keys_env="OUR_TEST_KEYS") as client:
        refused = client.get("/v1/models")
        client.get("/health")
        until(lambda: any(record.name == "deployments.observability.access_log" for record in caplog.records))
        (line,) = [vars(record) for record in caplog.records if record.name == "deployments.observability.access_log"]
        assert line["request_id"] == refused.headers["x-request-id"]
        assert (line["path"], line["outcome"], line["status"]) == ("/v1/models", "unauthorized", 401)
        assert read_outcomes(client, Authorization="Bearer right") == {}


def _samples(recorder: MetricsRecorder, name: str) -> list[Any]:
    return [sample for family in recorder.collect().families for sample in family.samples if sample.name == name]
