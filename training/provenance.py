"""Describes a measurement: command, processor, versions. Every published figure is stored with its description."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent
MEASURED_FILES = "*.py", "serve_config.yaml", "models/*/*.safetensors"  # files that a figure depends on


def describe_run(*, problems: int | None = None, seeds: Sequence[int] = ()) -> dict[str, Any]:
    """Returns the description of this process. Call it before the measurement: it includes the load of the machine."""
    return {
        "command": command_line(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": describe_processor(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
            "commit": commit(),
        },
        "problems": problems,
        "seeds": list(seeds),
    }


def command_line() -> str:
    """Returns the command of this process, in the form `python -m module arguments`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    return f"python {program} {shlex.join(sys.argv[1:])}".strip()


def describe_processor() -> dict[str, Any]:
    """Returns the name of the CPU, the cores that this process may use, and whether the CPU has AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = dict.fromkeys(("model name", "flags"), "")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            fields[name.strip()] = value.strip()
    return {
        "model": fields["model name"] or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "amx": "amx_tile" in fields["flags"].split(),
    }


def commit() -> str | None:
    """Returns the commit of the project, with `+` if measured files differ from it. Outside a repository it is None."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + "+" * bool(_git("status", "--porcelain", "--", *MEASURED_FILES))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout.strip()


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a JSON document. A reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


def provenance_sentence(run: Mapping[str, Any]) -> str:
    """Returns the end of a sentence that begins with "Measured", for the page that shows the figures of a run."""
    processor, versions = run["processor"], run["versions"]
    cores = f"{processor['cores']} core{'s' if processor['cores'] > 1 else ''}"
    amx, date, name = "with AMX" if processor["amx"] else "without AMX", run["date"], versions["commit"] or "unknown"
    return (
        f"with `{run['command']}` on {date} at commit {name}, on {processor['model']}, "
        f"{cores}, {amx}, with a load average of {run['load_average_before']} before the run; "
        f"Python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}."
    )
