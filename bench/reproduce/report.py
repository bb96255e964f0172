"""Turns the documents of a run into one report. Each figure carries the steps whose commands measured it."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.reproduce.losses import find_losses
from bench.reproduce.plan import REPEATED, TARGET_ALONE
from bench.reproduce.run import OutputFolder, read_json

LATENCY_BOUND_FACTOR = 2.0
Document = Mapping[str, Any]


@dataclass(frozen=True)
class RunDocuments:
    """The documents of an output folder."""

    plan: Document
    run: Document
    servers: Mapping[str, Document]
    records: Mapping[str, Document]
    results: Mapping[str, Document]
    latency_bound_s: float | None = None
    """The bound that the user has chosen."""


def read_documents(out: OutputFolder, latency_bound_s: float | None = None) -> RunDocuments:
    plan = read_json(out.path / "plan.json")
    names = [server["name"] for server in plan["servers"]]
    records = {}
    for step_id in _step_ids(plan):
        if (record := read_json(out.record(step_id))) is not None:
            records[step_id] = record
    # If a task of the quality fails, the document of the step has the figures of the tasks before it.
    results = {
        step_id: result
        for step_id, record in records.items()
        if (record["status"] == "ok" or record["kind"] == "quality")
        and (result := read_json(out.result(step_id))) is not None
    }
    servers = {name: record for name in names if (record := read_json(out.server(name))) is not None}
    return RunDocuments(plan, read_json(out.path / "run.json") or {}, servers, records, results, latency_bound_s)


def _step_ids(plan: Document) -> Iterator[str]:
    yield from (f"pilot-{clients}" for clients in plan["clients"])
    for server in plan["servers"]:
        yield from (f"load-{server['name']}-{clients}" for clients in plan["clients"])
        if server["modes"] and server["speculation"] is None:
            yield f"quality-{server['name']}"


def build_report(documents: RunDocuments) -> dict[str, Any]:
    plan = documents.plan
    cells = list(_load_cells(documents))
    quality = list(_quality_rows(documents))
    noise = _noise(cells, plan["clients"])
    bound = _latency_bound(documents, cells)
    per_unit = _rates_per_unit(cells, bound["seconds"])
    losses = find_losses(cells, quality, per_unit, noise, plan["unit"])
    return {
        "unit": plan["unit"],
        "allocation": plan["allocation"],
        "clients": plan["clients"],
        "tasks": plan["tasks"],
        "environment": _environment(documents.run.get("sessions", [])),
        "config_text": documents.run.get("config_text", ""),
        "summary": _summary(cells, noise, plan["clients"]),
        "losses": losses,
        "load": cells,
        "quality": quality,
        "latency_bound": bound,
        "rates_per_unit": per_unit,
        "noise": noise,
        "omissions": plan["omissions"],
        "notes": plan["notes"],
        "failures": _failures(documents, cells),
        "servers": [
            {
                "name": server["name"],
                "description": server["description"],
                "num_units": server["num_units"],
                "command": server["shell_command"],
                "ready_after_s": documents.servers.get(server["name"], {}).get("ready_after_s"),
                "failure": documents.servers.get(server["name"], {}).get("failure"),
            }
            for server in plan["servers"]
        ],
        "steps": [
            {
                name: documents.records[step_id][name]
                for name in ("id", "server", "command", "status", "reason", "started", "seconds")
            }
            for step_id in _step_ids(plan)
            if step_id in documents.records
        ],
    }


def _environment(sessions: Sequence[Document]) -> dict[str, str]:
    """Returns the values of all sessions. An interrupted run may have continued with another version."""
    names = dict.fromkeys(name for session in sessions for name in session["environment"])
    values = {name: dict.fromkeys(session["environment"].get(name, "") for session in sessions) for name in names}
    seconds = sum(session["seconds"] for session in sessions)
    return {name: " | ".join(entries) for name, entries in values.items()} | {"duration": f"{seconds / 60:.1f} minutes"}


def _load_cells(documents: RunDocuments) -> Iterator[dict[str, Any]]:
    """Yields the figures of each contender with each number of clients."""
    for server in documents.plan["servers"]:
        for contender in server["contenders"]:
            for clients in documents.plan["clients"]:
                step_id = f"load-{server['name']}-{clients}"
                yield {
                    "contender": contender["name"],
                    "server": server["name"],
                    "kind": server["kind"],
                    "mode": contender["mode"],
                    "speculation": server["speculation"],
                    "num_units": server["num_units"],
                    "clients": clients,
                    "step": step_id,
                    **_load_figures(documents, step_id, contender["mode"]),
                }


def _load_figures(documents: RunDocuments, step_id: str, mode: str | None) -> dict[str, Any]:
    record = documents.records.get(step_id)
    if record is None:
        return {"status": "missing", "reason": "not measured yet"}
    if step_id not in documents.results:
        return {"status": "failed", "reason": record["reason"] or "the file of the step cannot be read"}
    run = next((run for run in documents.results[step_id]["runs"] if mode is None or run["mode"] == mode), None)
    if run is None:
        return {"status": "failed", "reason": "the step has no figures of this contender"}
    if not run["answered"]:
        return {"status": "failed", "reason": f"no request was answered: {_error_text(run['errors'])}"}
    rates = [part["requests_per_s"] for part in run["rounds"]]
    return {
        "status": "ok",
        "reason": None,
        "requests": run["requests"],
        "rounds": len(rates),
        "requests_per_s": statistics.median(rates),
        "requests_per_s_range": [min(rates), max(rates)],
        "tokens_per_s": run["tokens_per_s"],
        "latency_p50_s": run["latency_s"]["p50"],
        "latency_p95_s": run["latency_s"]["p95"],
        "ttft_p50_s": run["ttft_s"]["p50"],
        "accuracy": run["accuracy"],
        "accuracy_count": run["accuracy_count"],
        "accuracy_interval": run["accuracy_interval"],
        "accepted_share": run["accepted_share"],
        "errors": run["errors"],
    }


def _clients_phrase(clients: int) -> str:
    return f"{clients} client{'s' if clients > 1 else ''}"


def _error_text(errors: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {kind}" for kind, count in errors.items()) or "no error was reported"


def _quality_rows(documents: RunDocuments) -> Iterator[dict[str, Any]]:
    for server in documents.plan["servers"]:
        step_id = f"quality-{server['name']}"
        document = documents.results.get(step_id)
        for entry in document["rows"] if document else ():
            contender = next((c["name"] for c in server["contenders"] if c["mode"] == entry["mode"]), entry["mode"])
            is_base = entry["mode"] == document["settings"]["base"] if document else False
            yield {"contender": contender, "server": server["name"], "step": step_id, "is_base": is_base, **entry}


def cell_of(cells: Sequence[Document], contender: str, clients: int) -> Document | None:
    """Returns the figures of a contender with a number of clients, if it was measured."""
    matching = (cell for cell in cells if cell["contender"] == contender and cell["clients"] == clients)
    return next((cell for cell in matching if cell["status"] == "ok"), None)


def _drift(first: float | None, repeated: float | None) -> float | None:
    return repeated / first - 1 if first and repeated else None


def _noise(cells: Sequence[Document], levels: Sequence[int]) -> list[dict[str, Any]]:
    """Returns by how much the target alone differs between the beginning and the end of the run."""
    entries = []
    for clients in levels:
        first, repeated = cell_of(cells, TARGET_ALONE, clients), cell_of(cells, REPEATED, clients)
        if first is None or repeated is None or not first["requests_per_s"]:
            continue
        entries.append(
            {
                "clients": clients,
                "first": first["requests_per_s"],
                "repeated": repeated["requests_per_s"],
                "drift": repeated["requests_per_s"] / first["requests_per_s"] - 1,
                "ttft_drift": _drift(first["ttft_p50_s"], repeated["ttft_p50_s"]),
                "steps": [repeated["step"], first["step"]],
            }
        )
    return entries


def _latency_bound(documents: RunDocuments, cells: Sequence[Document]) -> dict[str, Any]:
    if documents.latency_bound_s is not None:
        return {"seconds": documents.latency_bound_s, "source": "chosen with --latency-bound-s", "step": None}
    clients = min(documents.plan["clients"])
    base = cell_of(cells, TARGET_ALONE, clients)
    phrase = _clients_phrase(clients)
    source = f"{LATENCY_BOUND_FACTOR:g} times the 95th percentile of the target alone with {phrase}"
    if base is None:
        return {"seconds": None, "source": f"{source}, which was not measured", "step": None}
    return {"seconds": LATENCY_BOUND_FACTOR * base["latency_p95_s"], "source": source, "step": base["step"]}


def _rates_per_unit(cells: Sequence[Document], bound_s: float | None) -> list[dict[str, Any]]:
    """Returns the rate of each contender at its highest number of clients that meets the bound, per GPU or core."""
    entries: list[dict[str, Any]] = []
    if bound_s is None:
        return entries
    for contender in dict.fromkeys(cell["contender"] for cell in cells):
        own = [cell for cell in cells if cell["contender"] == contender and cell["status"] == "ok"]
        if not own:
            continue
        meeting = [cell for cell in own if cell["latency_p95_s"] <= bound_s and not cell["errors"]]
        best = max(meeting, key=lambda cell: int(cell["clients"]), default=None)
        entries.append(
            {
                "contender": contender,
                "kind": own[0]["kind"],
                "mode": own[0]["mode"],
                "num_units": own[0]["num_units"],
                "clients": best["clients"] if best else None,
                "latency_p95_s": best["latency_p95_s"] if best else None,
                "requests_per_s_per_unit": best["requests_per_s"] / best["num_units"] if best else None,
                "step": best["step"] if best else None,
            }
        )
    return entries


def _summary(cells: Sequence[Document], noise: Sequence[Document], levels: Sequence[int]) -> list[dict[str, Any]]:
    """Returns for each number of clients the fastest mode of PARSE and the fastest baseline on no more hardware."""
    noise_by_level = {entry["clients"]: entry for entry in noise}
    entries = []
    for clients in levels:
        level = [cell for cell in cells if cell["clients"] == clients and cell["status"] == "ok"]
        modes = [cell for cell in level if cell["kind"] == "parse" and cell["mode"] != "off"]
        baselines = [cell for cell in level if cell["kind"] == "vllm" and cell["contender"] != REPEATED]
        best_mode = max(modes, key=lambda cell: float(cell["requests_per_s"]), default=None)
        num_units = max((cell["num_units"] for cell in modes), default=math.inf)
        baselines = [cell for cell in baselines if cell["num_units"] <= num_units]
        best_baseline = max(baselines, key=lambda cell: float(cell["requests_per_s"]), default=None)
        entry: dict[str, Any] = {
            "clients": clients,
            "parse": _figure(best_mode),
            "baseline": _figure(best_baseline),
            "target_alone": _figure(cell_of(cells, TARGET_ALONE, clients)),
            "noise": noise_by_level.get(clients),
        }
        if best_mode and best_baseline and best_baseline["requests_per_s"]:
            entry["ratio"] = best_mode["requests_per_s"] / best_baseline["requests_per_s"]
        entries.append(entry)
    return entries


def _figure(cell: Document | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    names = "contender", "num_units", "requests_per_s", "accuracy", "accuracy_interval", "step"
    return {name: cell[name] for name in names}


def _failures(documents: RunDocuments, cells: Sequence[Document]) -> list[dict[str, Any]]:
    """Returns what was planned and has no figures, and requests that failed."""
    failures = [
        {"name": name, "reason": record["failure"], "step": None}
        for name, record in documents.servers.items()
        if record["failure"] is not None
    ]
    failures += [
        {"name": record["id"], "reason": record["reason"], "step": record["id"]}
        for record in documents.records.values()
        if record["status"] != "ok"
    ]
    missing = [step_id for step_id in _planned_ids(documents.plan) if step_id not in documents.records]
    failures += [{"name": step_id, "reason": "not measured yet", "step": None} for step_id in missing]
    for cell in cells:
        name = f"{cell['contender']} with {_clients_phrase(cell['clients'])}"
        if cell["status"] == "ok" and cell["errors"]:
            reason = f"{sum(cell['errors'].values())} of {cell['requests']} requests failed: "
            failures.append({"name": name, "reason": reason + _error_text(cell["errors"]), "step": cell["step"]})
        elif cell["status"] == "failed" and documents.records[cell["step"]]["status"] == "ok":
            failures.append({"name": name, "reason": cell["reason"], "step": cell["step"]})
    return failures


def _planned_ids(plan: Document) -> list[str]:
    return [step_id for step_id in _step_ids(plan) if not step_id.startswith("pilot-")]
