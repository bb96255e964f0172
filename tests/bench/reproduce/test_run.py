"""A run continues after failures and interruptions. The servers and most commands are scripted."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.reproduce import run
from bench.reproduce.benchmark_server import BenchmarkServer, ServerNotStarted
from bench.reproduce.hardware import Allocation
from bench.reproduce.html_report import render_html
from bench.reproduce.plan import ReproducePlan, ServerPlan
from bench.reproduce.report import build_report, read_documents
from bench.reproduce.run import OutputFolder, read_json, run_plan
from bench.reproduce.steps import BenchmarkStep
from bench.reproduce.tasks import QualityOptions, file_tasks
from bench.vllm_server import free_port
from tests.bench.reproduce.documents import quality_row, record
from training.provenance import write_document

# Appends its name to a file, and writes a document as the commands of steps do.
SCRIPT = """
import json, sys
name, ran, behaviour = sys.argv[1:4]
file = sys.argv[sys.argv.index("--json") + 1]
open(ran, "a").write(name + "\\n")
print("some progress")
if behaviour == "fail":
    sys.exit(f"{name}: something is wrong")
if behaviour != "silent":
    open(file, "w").write(json.dumps({"name": name}))
"""


@pytest.fixture
def port() -> int:
    return free_port()


def scripted(name: str, port: int, *arguments: str, modes: tuple[str, ...] = ()) -> ServerPlan:
    command = (sys.executable, "-m", "tests.bench.reproduce.scripted_server", str(port), *arguments)
    kind: Any = "parse" if modes else "vllm"
    return ServerPlan(name, kind, f"Server {name}.", command, port, "/health", 1, modes=modes, start_timeout_s=60)


def plan_of(*servers: ServerPlan, problems: Path = Path("problems.jsonl")) -> ReproducePlan:
    return ReproducePlan(servers, (1,), "core", Allocation(1, 1), file_tasks(QualityOptions(4), problems, None))


class Commands:
    """Replaces the commands of steps by scripts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = folder / "ran"
        self.behaviours: dict[str, str] = {}
        monkeypatch.setattr(run, "pilot_steps", lambda plan: [])
        monkeypatch.setattr(run, "measurement_steps", lambda plan, server, counts: self.steps(server))

    def steps(self, server: ServerPlan) -> list[BenchmarkStep]:
        return [
            BenchmarkStep(
                f"{server.name}-{number}",
                server.name,
                "load",
                (
                    "-c",
                    SCRIPT,
                    f"{server.name}-{number}",
                    str(self.log),
                    self.behaviours.get(f"{server.name}-{number}", ""),
                ),
                1,
            )
            for number in (1, 2)
        ]

    def take_names(self) -> list[str]:
        """Returns the steps that have run since the last call."""
        names = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return names


@pytest.fixture
def commands(tmp_path, monkeypatch):
    return Commands(tmp_path, monkeypatch)


def test_finished_steps_are_kept_and_their_servers_not_started_again(tmp_path, port, commands):
    out, plan = OutputFolder(tmp_path / "out"), plan_of(scripted("one", port), scripted("two", port))
    num_steps: list[int] = []
    assert run_plan(plan, out, 1.0, num_steps.append) == 4
    assert commands.take_names() == ["one-1", "one-2", "two-1", "two-2"] and num_steps == [2, 4]
    assert read_json(out.result("two-2")) == {"name": "two-2"}
    out.log("one").unlink()
    out.record("two-1").unlink()  # as if the command had been interrupted in this step
    assert run_plan(plan, out, 1.0) == 1
    assert commands.take_names() == ["two-1"] and not out.log("one").exists()


def test_a_step_with_other_arguments_runs_again(tmp_path, port, commands):
    out, plan = OutputFolder(tmp_path / "out"), plan_of(scripted("one", port))
    run_plan(plan, out, 1.0)
    commands.take_names()
    commands.behaviours["one-2"] = "other"
    run_plan(plan, out, 1.0)
    assert commands.take_names() == ["one-2"]


@pytest.mark.parametrize("change", ["command", "environment", "config", "problems"])
def test_the_steps_of_a_changed_server_run_again(tmp_path, port, commands, change):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("one problem")
    out, server = OutputFolder(tmp_path / "out"), scripted("one", port)
    plan = replace(plan_of(server, problems=problems), files={"configs/one.yaml": "a: 1"})
    run_plan(plan, out, 1.0)
    assert commands.take_names() == ["one-1", "one-2"]
    if change == "command":
        plan = replace(plan, servers=(replace(server, command=(*server.command, "--ignored")),))
    elif change == "environment":
        plan = replace(plan, servers=(replace(server, environment={"A": "1"}),))
    elif change == "config":
        plan = replace(plan, files={"configs/one.yaml": "a: 2"})
    else:
        problems.write_text("another problem")
    run_plan(plan, out, 1.0)
    assert commands.take_names() == ["one-1", "one-2"]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("fail", "exit code 1: one-1: something is wrong"), ("silent", "the command wrote no JSON document")],
)
def test_a_step_that_fails_is_recorded_and_tried_again_later(tmp_path, port, commands, behaviour, reason):
    out, plan = OutputFolder(tmp_path / "out"), plan_of(scripted("one", port))
    commands.behaviours["one-1"] = behaviour
    run_plan(plan, out, 1.0)
    assert commands.take_names() == ["one-1", "one-2"]
    assert [read_json(out.record(f"one-{number}"))["status"] for number in (1, 2)] == ["failed", "ok"]
    assert read_json(out.record("one-1"))["reason"] == reason
    run_plan(plan, out, 1.0)
    assert commands.take_names() == ["one-1"]


def test_a_server_that_does_not_start_fails_its_steps_with_its_reason_and_the_others_run(tmp_path, port, commands):
    out, plan = OutputFolder(tmp_path / "out"), plan_of(scripted("one", port, "fail"), scripted("two", port))
    run_plan(plan, out, 1.0)
    assert commands.take_names() == ["two-1", "two-2"]
    for number in (1, 2):
        assert "(exit code 1): ValueError: No memory is left" in read_json(out.record(f"one-{number}"))["reason"]
    assert "No memory" in read_json(out.server("one"))["failure"] and read_json(out.server("two"))["failure"] is None


def test_a_port_in_use_is_said(tmp_path, port):
    started = BenchmarkServer(scripted("one", port), tmp_path / "log")
    message = f"port {port} is in use: choose another one with --port"
    with socket.create_server(("127.0.0.1", port)), started, pytest.raises(ServerNotStarted, match=message):
        started.ensure_running()


def test_a_server_whose_program_is_missing_is_a_failure(tmp_path, port):
    server = ServerPlan("one", "vllm", "", ("/nonexistent/python",), port, "/health", 1)
    with (
        BenchmarkServer(server, tmp_path / "log") as started,
        pytest.raises(ServerNotStarted, match="cannot be started"),
    ):
        started.ensure_running()


def test_a_server_that_has_ended_is_noticed_and_no_process_is_left(tmp_path, port):
    with BenchmarkServer(scripted("one", port), tmp_path / "log") as started:
        started.ensure_running()
        process = started._process
        assert process is not None
        process.kill()
        process.wait()
        with pytest.raises(ServerNotStarted, match="has ended"):
            started.ensure_running()
    with BenchmarkServer(scripted("one", port), tmp_path / "log") as started:
        started.ensure_running()
        process = started._process
    assert process is not None and process.poll() is not None
    assert started.ready_after_s is not None


def test_figures_of_tasks_before_a_failure_are_part_of_the_report(tmp_path, port):
    out = OutputFolder(tmp_path)
    for folder in ("steps", "records"):
        (tmp_path / folder).mkdir()
    write_document(tmp_path / "plan.json", run.plan_document(plan_of(scripted("parse", port, modes=("off", "full")))))
    failed = record("quality-parse", "parse", "failed", "bench.quality: mbpp: no data set") | {"kind": "quality"}
    write_document(out.record("quality-parse"), failed)
    rows = [quality_row("off", 0.9, 0.0, (-0.1, 0.1)), quality_row("full", 0.9, 0.0, (-0.1, 0.1))]
    write_document(out.result("quality-parse"), {"settings": {"base": "off"}, "rows": rows})
    report = build_report(read_documents(out))
    assert [row["contender"] for row in report["quality"]] == ["parse-off", "parse-full"]
    assert "bench.quality: mbpp: no data set" in [failure["reason"] for failure in report["failures"]]


def test_the_quality_of_a_server_that_speculates_is_not_missed(tmp_path, port):
    server = scripted("parse", port, modes=("off", "full"))
    composed = replace(server, name="parse-eagle3", speculation="eagle3")
    write_document(tmp_path / "plan.json", run.plan_document(plan_of(server, composed)))
    names = {failure["name"] for failure in build_report(read_documents(OutputFolder(tmp_path)))["failures"]}
    assert names == {"load-parse-1", "load-parse-eagle3-1", "quality-parse"}


def test_environment_variables_are_added_and_removed(tmp_path, port, monkeypatch):
    monkeypatch.setenv("SECRET_OF_CLIENTS", "x")
    server = ServerPlan("one", "vllm", "", ("true",), port, "/", 1, {"ADDED": "1"}, ("SECRET_OF_CLIENTS",))
    environment = BenchmarkServer(server, tmp_path / "log")._environment(os.environ)
    assert environment["ADDED"] == "1" and "SECRET_OF_CLIENTS" not in environment and "PATH" in environment


@pytest.mark.slow
def test_the_real_commands_write_what_the_report_reads(tmp_path, port):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "Which number?", "answer": "7"}\n{"prompt": "And now?", "answer": "8"}\n')
    modes = ("off", "full", "exact")
    servers = (scripted("vllm", port), scripted("parse", port, modes=modes), scripted("vllm-repeated", port))
    out = OutputFolder(tmp_path / "out")
    run_plan(plan_of(*servers, problems=problems), out, 0.01)
    report = build_report(read_documents(out))
    cells = {(cell["contender"], cell["clients"]): cell for cell in report["load"]}
    assert [cell["status"] for cell in cells.values()] == ["ok", "ok", "ok", "failed", "ok"]
    num_requests = cells["vllm", 1]["requests"]  # every second one has the right answer, beginning with the first
    assert cells["vllm", 1]["accuracy"] == pytest.approx((num_requests + 1) // 2 / num_requests)
    assert cells["parse-full", 1]["accepted_share"] == 0.8
    assert len(report["noise"]) == 1 and report["rates_per_unit"]
    reasons = {failure["name"]: failure["reason"] for failure in report["failures"]}
    assert reasons.keys() == {"parse-exact with 1 client"}
    assert [row["contender"] for row in report["quality"]] == ["parse-off", "parse-full"]
    assert "parse-full" in render_html(report)


@pytest.mark.slow
def test_a_configuration_that_is_not_supported_ends_the_command(tmp_path):
    command = [sys.executable, "-m", "bench.reproduce", "serve_config.yaml", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "bench.reproduce: target.engine.kind is native" in done.stderr
    assert not (tmp_path / "out").exists()
