"""Runs the measurements of a plan, one after the other, and continues after an interruption.

The output folder holds:

    plan.json            what is compared
    run.json             the machine and the versions of each session, its seconds, and the configuration
    steps/ID.json        what the command of a measurement wrote
    records/ID.json      that command, and whether it succeeded
    servers/NAME.json    the command of a server, and why it did not start
    logs/                what servers and commands printed
"""

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.reproduce.benchmark_server import BenchmarkServer, ServerNotStarted
from bench.reproduce.plan import ReproducePlan, ServerPlan
from bench.reproduce.steps import (
    BenchmarkStep,
    RequestCount,
    choose_counts,
    measurement_steps,
    num_cells,
    pilot_rate,
    pilot_steps,
)
from training.provenance import write_document

STEP_TIMEOUT_S = 6 * 3600.0  # a request has a limit of its own
MAX_REASON_LENGTH = 500


@dataclass(frozen=True)
class OutputFolder:
    """The files of a run."""

    path: Path

    def result(self, step_id: str) -> Path:
        return self.path / "steps" / f"{step_id}.json"

    def record(self, step_id: str) -> Path:
        return self.path / "records" / f"{step_id}.json"

    def server(self, name: str) -> Path:
        return self.path / "servers" / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def is_finished(self, step: BenchmarkStep, digest: str) -> bool:
        """Returns whether an earlier run has finished a step with the same arguments and the same server."""
        record = read_json(self.record(step.id))
        return (
            record is not None
            and record["status"] == "ok"
            and tuple(record["arguments"]) == step.arguments
            and record.get("digest") == digest
            and self.result(step.id).exists()
        )


def read_json(path: Path) -> Any:
    """Returns the document, or None if there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def print_progress(text: str) -> None:
    print(f"{datetime.now().strftime('%H:%M:%S')}  {text}", flush=True)


def run_plan(
    plan: ReproducePlan, out: OutputFolder, load_minutes: float, after_server: Callable[[int], None] = lambda _: None
) -> int:
    """Runs all steps that are not finished, and returns their number.

    A step or a server that fails is recorded, and the others continue. `after_server` receives the number of steps that
    have run so far.
    """
    num_steps = 0
    for name, content in plan.files.items():
        file = out.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    for folder in ("steps", "records", "servers", "logs"):
        (out.path / folder).mkdir(parents=True, exist_ok=True)
    write_document(out.path / "plan.json", plan_document(plan))
    for index, server_plan in enumerate(plan.servers):
        digest = digest_of(plan, server_plan)
        with BenchmarkServer(server_plan, out.log(server_plan.name)) as server:
            if index == 0:
                for step in pilot_steps(plan):
                    num_steps += run_step(step, server, out, digest)
            for step in measurement_steps(plan, server_plan, request_counts(plan, out, load_minutes)):
                num_steps += run_step(step, server, out, digest)
            if server.failure is not None or server.ready_after_s is not None:
                write_document(out.server(server_plan.name), server.record())
        after_server(num_steps)
    return num_steps


def digest_of(plan: ReproducePlan, server: ServerPlan) -> str:
    """Returns a digest of what a measurement depends on besides its arguments: the server, and files."""
    prompts = plan.tasks.prompts
    content = prompts.read_text() if prompts is not None and prompts.exists() else None
    parts = [list(server.command), sorted(server.environment.items()), sorted(plan.files.items()), content]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def plan_document(plan: ReproducePlan) -> dict[str, Any]:
    document = asdict(plan)
    document["tasks"] = {name: _json_value(value) for name, value in document["tasks"].items() if name != "files"}
    document["files"] = sorted(plan.files)
    document["servers"] = [
        {
            **{name: value for name, value in entry.items() if name != "command"},  # it can contain secrets
            "environment": sorted(server.environment),
            "shell_command": server.shell_command,
            "contenders": contenders(server),
        }
        for entry, server in zip(document["servers"], plan.servers, strict=True)
    ]
    return document


def contenders(server: ServerPlan) -> list[dict[str, str | None]]:
    modes: list[str | None] = [*server.modes] or [None]
    return [{"name": server.contender(mode), "mode": mode} for mode in modes]


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def request_counts(plan: ReproducePlan, out: OutputFolder, load_minutes: float) -> Mapping[int, RequestCount]:
    """Returns the numbers of requests, from the pilot. Without a pilot they are the smallest ones."""
    rates = {}
    for step in pilot_steps(plan):
        if out.is_finished(step, digest_of(plan, plan.servers[0])) and step.clients is not None:
            rates[step.clients] = pilot_rate(read_json(out.result(step.id)))
    return choose_counts(plan.clients, rates, 60 * load_minutes / num_cells(plan))


def run_step(step: BenchmarkStep, server: BenchmarkServer, out: OutputFolder, digest: str) -> bool:
    """Runs the command of a step, and records the result. Returns False if the step was finished earlier."""
    if out.is_finished(step, digest):
        print_progress(f"{step.id}: finished earlier")
        return False
    result, started = out.result(step.id), time.monotonic()
    record: dict[str, Any] = {
        "id": step.id,
        "server": step.server,
        "kind": step.kind,
        "clients": step.clients,
        "arguments": list(step.arguments),
        "digest": digest,
        "command": step.shell_command(server.plan.url, result),
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    for path in (result, out.record(step.id)):
        path.unlink(missing_ok=True)
    print_progress(f"{step.id}")
    reason: str | None = None
    try:
        server.ensure_running()
        started = time.monotonic()
        reason = _run_command(step.command(server.plan.url, result), out.log(step.id))
        if reason is None and read_json(result) is None:
            reason = "the command wrote no JSON document"
    except ServerNotStarted as error:
        reason = str(error)
    record |= {
        "status": "ok" if reason is None else "failed",
        "reason": reason,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_document(out.record(step.id), record)
    if reason is not None:
        print_progress(f"{step.id} failed: {reason}")
    return True


def _run_command(command: list[str], log: Path) -> str | None:
    """Returns why the command failed, or None."""
    try:
        with log.open("wb") as output:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=STEP_TIMEOUT_S
            ).returncode
    except subprocess.TimeoutExpired:
        return f"the command has not ended after {STEP_TIMEOUT_S / 3600:g} h"
    if code == 0:
        return None
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else 'no output'}"[:MAX_REASON_LENGTH]
