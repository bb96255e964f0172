"""The documents of an invented run, whose report is computed by hand in the tests."""

from typing import Any

from bench.reproduce.report import RunDocuments

CLIENTS = (1, 8)
UNITS = {"vllm": 1, "vllm-all-cores": 2, "vllm-eagle3": 1, "parse": 2, "vllm-repeated": 1}
MODES = ("off", "full", "exact")
# server, mode, clients: requests/s of each round, first token, p95 of the latency, correct answers
FIGURES: dict[tuple[str, str, int], tuple[list[float], float, float, float]] = {
    ("vllm", "default", 1): ([3.0, 1.0, 2.0], 0.02, 0.6, 1.0),
    ("vllm-all-cores", "default", 1): ([1.0], 0.03, 0.5, 1.0),
    ("vllm-eagle3", "default", 1): ([4.0], 0.03, 0.3, 1.0),
    ("parse", "off", 1): ([2.0], 0.02, 0.6, 1.0),
    ("parse", "full", 1): ([5.0], 0.15, 0.4, 1.0),
    ("parse", "exact", 1): ([1.5], 0.05, 0.7, 1.0),
    ("vllm-repeated", "default", 1): ([1.8], 0.02, 0.6, 1.0),
    ("vllm", "default", 8): ([8.0], 0.04, 1.3, 0.96),
    ("vllm-all-cores", "default", 8): ([7.0], 0.05, 1.25, 0.96),
    ("vllm-eagle3", "default", 8): ([16.0], 0.06, 0.9, 0.96),
    ("parse", "off", 8): ([8.0], 0.04, 1.3, 0.96),
    ("parse", "full", 8): ([12.0], 0.5, 1.1, 0.80),
    ("parse", "exact", 8): ([7.6], 0.1, 1.4, 0.96),
    ("vllm-repeated", "default", 8): ([8.8], 0.07, 1.2, 0.96),
}


def load_run(mode: str, figures: tuple[list[float], float, float, float]) -> dict[str, Any]:
    rates, ttft_s, p95_s, accuracy = figures
    return {
        "mode": mode,
        "requests": 40,
        "answered": 40,
        "rounds": [{"requests_per_s": rate} for rate in rates],
        "tokens_per_s": 321.0,
        "latency_s": {"p50": p95_s / 2, "p95": p95_s},
        "ttft_s": {"p50": ttft_s},
        "accuracy": accuracy,
        "accuracy_count": 40,
        "accuracy_interval": [accuracy - 0.1, accuracy + 0.03 if accuracy < 1 else 1.0],
        "accepted_share": 0.75 if mode == "full" else None,
        "errors": {},
    }


def quality_row(mode: str, accuracy: float, loss: float, interval: tuple[float, float]) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "loss": loss, "loss_interval": list(interval), "p": 0.031}
    return {"task": "demo", "mode": mode, "num_problems": 100, **figures, "accepted_share": None, "speedup": 2.0}


def server(name: str) -> dict[str, Any]:
    is_parse = name == "parse"
    return {
        "name": name,
        "kind": "parse" if is_parse else "vllm",
        "description": f"The server {name}.",
        "num_units": UNITS[name],
        "speculation": "eagle3" if "eagle3" in name else None,
        "modes": list(MODES) if is_parse else [],
        "contenders": [{"name": f"parse-{mode}", "mode": mode} for mode in MODES]
        if is_parse
        else [{"name": name, "mode": None}],
        "shell_command": f"start {name}",
    }


def record(step_id: str, name: str, status: str = "ok", reason: str | None = None) -> dict[str, Any]:
    program = "bench.quality" if step_id.startswith("quality") else "bench.load"
    command = f"python -m {program} --json steps/{step_id}.json '<b>'"
    started = "2026-01-01 00:00:00 UTC"
    times = {"started": started, "seconds": 12.0}
    return {"id": step_id, "server": name, "command": command, "status": status, "reason": reason, **times}


def invented_run(**changes: Any) -> RunDocuments:
    records: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for name in UNITS:
        for clients in CLIENTS:
            step_id = f"load-{name}-{clients}"
            records[step_id] = record(step_id, name)
            runs = [load_run(key[1], figures) for key, figures in FIGURES.items() if key[0::2] == (name, clients)]
            results[step_id] = {"runs": runs}
    records["quality-parse"] = record("quality-parse", "parse")
    rows = [
        quality_row("off", 0.95, 0.0, (-0.01, 0.01)),
        quality_row("full", 0.92, 0.03, (0.01, 0.05)),
        quality_row("exact", 0.95, 0.0, (-0.02, 0.02)),
    ]
    results["quality-parse"] = {"settings": {"base": "off"}, "rows": rows}
    plan = {
        "unit": "core",
        "allocation": {"target": 1, "total": 2},
        "clients": list(CLIENTS),
        "tasks": {"prompts": None},
        "omissions": [{"name": "vllm-omitted", "reason": "there is no head"}],
        "notes": ["A note with <i>markup</i> & signs."],
        "servers": [server(name) for name in UNITS],
    }
    sessions = [{"environment": {"commit": name}, "seconds": 90.0} for name in ("aaa", "bbb", "aaa")]
    run = {"sessions": sessions, "config_text": "a: <script>alert(1)</script>\n"}
    servers = {name: {"name": name, "ready_after_s": 20.0, "failure": None} for name in UNITS}
    documents: dict[str, Any] = {
        "plan": plan,
        "run": run,
        "servers": servers,
        "records": records,
        "results": results,
        **changes,
    }
    return RunDocuments(**documents)
