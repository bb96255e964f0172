"""The report of an invented run has the figures that follow from it by hand."""

import copy
import json
from typing import Any

import pytest

from bench.reproduce.html_report import render_html
from bench.reproduce.report import RunDocuments, build_report, cell_of
from tests.bench.reproduce.documents import invented_run, record


@pytest.fixture
def documents() -> RunDocuments:
    return copy.deepcopy(invented_run())


def losses_of(report: dict[str, Any]) -> dict[tuple[int | None, str, str], tuple[float | None, bool]]:
    return {
        (loss["clients"], loss["contender"], loss["against"]): (loss["ratio"], loss["within_noise"])
        for loss in report["losses"]
    }


def test_a_rate_is_the_median_of_the_rounds(documents):
    cell = cell_of(build_report(documents)["load"], "vllm", 1)
    assert cell is not None
    assert (cell["requests_per_s"], cell["requests_per_s_range"], cell["rounds"]) == (2.0, [1.0, 3.0], 3)


def test_the_summary_compares_the_fastest_mode_with_the_fastest_baseline(documents):
    one, eight = build_report(documents)["summary"]
    assert (one["parse"]["contender"], one["baseline"]["contender"]) == ("parse-full", "vllm-eagle3")
    assert one["ratio"] == pytest.approx(1.25) and eight["ratio"] == pytest.approx(0.75)


def test_the_noise_is_the_difference_between_the_two_measurements_of_the_target_alone(documents):
    noise = build_report(documents)["noise"]
    assert [entry["drift"] for entry in noise] == pytest.approx([-0.1, 0.1])
    assert [entry["ttft_drift"] for entry in noise] == pytest.approx([0.0, 0.75])


def test_all_losses_are_listed(documents):
    report = build_report(documents)
    losses = losses_of(report)
    expected: dict[tuple[int | None, str, str], tuple[float | None, bool]] = {
        (1, "parse-exact", "vllm"): (0.4, False),  # its first token; its rate has the same key
        (8, "parse-full", "vllm-eagle3"): (0.375, False),  # per core; the rate has the same key
        (8, "parse-exact", "vllm"): (0.4, True),  # its first token is within the drift of the first token
        (8, "parse-full", "vllm"): (None, False),
        (None, "parse-full", "parse-off"): (None, False),
    }
    assert losses.keys() == expected.keys()
    for key, (ratio, within_noise) in expected.items():
        assert losses[key] == (ratio if ratio is None else pytest.approx(ratio), within_noise), key
    kinds = [(loss["kind"], loss["clients"], loss["ratio"], loss["within_noise"]) for loss in report["losses"]]
    slower = "mode against the target alone, requests/s"
    assert (slower, 1, pytest.approx(0.75), False) in kinds
    assert (slower, 8, pytest.approx(0.95), True) in kinds
    assert ("best mode, requests/s", 8, pytest.approx(0.75), False) in kinds
    assert ("best mode, requests/s per core within the latency bound", 8, pytest.approx(0.375), False) in kinds
    assert len(kinds) == 8


def test_a_baseline_on_more_hardware_is_not_compared(documents):
    for server in documents.plan["servers"]:
        if server["name"] == "vllm-eagle3":
            server["num_units"] = 3
    report = build_report(documents)
    assert "best mode, requests/s" not in [loss["kind"] for loss in report["losses"]]
    assert report["summary"][1]["baseline"]["contender"] == "vllm"


def test_rates_per_core_use_the_highest_number_of_clients_within_the_bound(documents):
    report = build_report(documents)
    assert report["latency_bound"]["seconds"] == pytest.approx(1.2)  # twice 0.6 s
    rates = {
        entry["contender"]: (entry["clients"], entry["requests_per_s_per_unit"]) for entry in report["rates_per_unit"]
    }
    assert rates == {
        "vllm": (1, 2.0),
        "vllm-all-cores": (1, 0.5),
        "vllm-eagle3": (8, 16.0),
        "parse-off": (1, 1.0),
        "parse-full": (8, 6.0),
        "parse-exact": (1, 0.75),
        "vllm-repeated": (8, 8.8),
    }


def test_a_contender_that_misses_the_bound_has_no_rate():
    report = build_report(invented_run(latency_bound_s=0.45))
    rates = {entry["contender"]: entry["requests_per_s_per_unit"] for entry in report["rates_per_unit"]}
    assert rates["vllm"] is None and rates["vllm-eagle3"] == 4.0 and rates["parse-full"] == 2.5
    assert "chosen with --latency-bound-s" in report["latency_bound"]["source"]


def test_requests_that_fail_do_not_meet_the_bound_and_are_reported(documents):
    (run,) = documents.results["load-vllm-eagle3-8"]["runs"]
    run["errors"] = {"500": 3}
    report = build_report(documents)
    rates = {entry["contender"]: entry["clients"] for entry in report["rates_per_unit"]}
    assert rates["vllm-eagle3"] == 1
    assert {
        "name": "vllm-eagle3 with 8 clients",
        "reason": "3 of 40 requests failed: 3 of 500",
        "step": "load-vllm-eagle3-8",
    } in report["failures"]


def test_a_mode_that_is_not_answered_is_a_failure(documents):
    run = documents.results["load-parse-8"]["runs"][2]
    run |= {"answered": 0, "errors": {"400": 40}}
    report = build_report(documents)
    assert cell_of(report["load"], "parse-exact", 8) is None
    assert [f["reason"] for f in report["failures"]] == ["no request was answered: 40 of 400"]


def test_a_server_that_does_not_start_is_reported_and_the_others_are_compared(documents):
    reason = "the server does not start (exit code 1): ValueError: no memory"
    documents.servers["vllm-eagle3"].update(failure=reason, ready_after_s=None)
    for clients in (1, 8):
        step_id = f"load-vllm-eagle3-{clients}"
        documents.records[step_id].update(status="failed", reason=reason)
        del documents.results[step_id]
    report = build_report(documents)
    assert [entry["name"] for entry in report["failures"]] == [
        "vllm-eagle3",
        "load-vllm-eagle3-1",
        "load-vllm-eagle3-8",
    ]
    assert {entry["reason"] for entry in report["failures"]} == {reason}
    assert report["summary"][1]["ratio"] == pytest.approx(1.5)  # 12 against 8
    assert reason in render_html(report)


def test_an_interrupted_run_has_a_report(documents):
    done = ("load-vllm-1",)
    partial = RunDocuments(
        documents.plan,
        documents.run,
        {},
        {step_id: documents.records[step_id] for step_id in done},
        {step_id: documents.results[step_id] for step_id in done},
    )
    report = build_report(partial)
    assert report["losses"] == [] and report["summary"][0]["parse"] is None
    assert len(report["failures"]) == 10
    assert "Too little was measured to tell." in render_html(report)
    nothing = RunDocuments(documents.plan, documents.run, {}, {}, {})
    assert "which was not measured" in render_html(build_report(nothing))


def test_scores_are_shown_without_percent(documents):
    for entry in documents.results["quality-parse"]["rows"]:
        entry |= {"task": "mtbench", "mean_score": 8.5, "loss": 0.3, "loss_interval": [0.1, 0.5]}
        del entry["accuracy"]
    html = render_html(build_report(documents))
    assert "8.50" in html and "0.30 points" in html and "0.10 to 0.50" in html


def test_the_report_can_be_written_as_json_and_every_figure_names_its_step(documents):
    report = json.loads(json.dumps(build_report(documents)))
    steps = {step["id"] for step in report["steps"]}
    assert {cell["step"] for cell in report["load"]} | {entry["step"] for entry in report["quality"]} <= steps
    for loss in report["losses"]:
        assert loss["steps"] and set(loss["steps"]) <= steps


def test_the_environment_has_the_versions_of_all_sessions(documents):
    assert build_report(documents)["environment"] == {"commit": "aaa | bbb", "duration": "4.5 minutes"}


def test_a_machine_that_is_not_quiet_is_said(documents):
    assert "The machine was not quiet" not in render_html(build_report(documents))
    documents.results["load-vllm-repeated-8"]["runs"][0]["rounds"][0]["requests_per_s"] = 11.0
    assert "The machine was not quiet" in render_html(build_report(documents))


def test_texts_of_a_run_are_escaped(documents):
    documents.records["load-vllm-8"].update(record("load-vllm-8", "vllm", "failed", "<script>x</script>"))
    html = render_html(build_report(documents))
    assert "<script" not in html and "<i>markup" not in html and "&lt;script&gt;x" in html
