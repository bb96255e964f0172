"""Prints which libraries and which GPU the measurements on a GPU find. Exits with 1 if something is missing.

python -m bench.gpu_environment --device cuda

It imports only the standard library until it has checked that the others exist.
"""

import argparse
import importlib.util
import json
import platform
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
# What the tests marked `cuda` and `bench.gpu` import, by the names of the packages. tests/bench/test_gpu_script.py
# checks that they need no others.
LIBRARIES = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface-hub",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "typing_inspection": "typing-inspection",
    "annotated_types": "annotated-types",
    "aiohttp": "aiohttp",
    "yaml": "pyyaml",
    "jinja2": "jinja2",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "xdist": "pytest-xdist",
    "hypothesis": "hypothesis",
}


def library_versions() -> dict[str, str | None]:
    """Returns the version of each package, or None if it is missing."""
    versions: dict[str, str | None] = {}
    for module, package in LIBRARIES.items():
        try:
            versions[package] = version(package) if importlib.util.find_spec(module) else None
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def older_than_required(versions: dict[str, str | None]) -> dict[str, str]:
    """Returns the packages that are older than `pyproject.toml` requires, with the required version."""
    dependencies: list[str] = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    older = {}
    for dependency in dependencies:
        match = re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", dependency)
        installed = versions.get(match[1]) if match else None
        if match and installed and _release(installed) < _release(match[2]):
            older[match[1]] = match[2]
    return older


def _release(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text.partition("+")[0])]


def describe_gpu(device: str) -> dict[str, Any]:
    import torch

    index = torch.device(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": torch.cuda.get_device_capability(index),
        "cuda": torch.version.cuda,
        "free_gib": free_bytes / 2**30,
        "total_gib": total_bytes / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_environment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    versions = library_versions()
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "libraries": versions,
        "older_than_required": older_than_required(versions),
    }
    missing = [package for package, installed in versions.items() if installed is None]
    problems = [f"missing packages: {', '.join(missing)}"] if missing else []
    if args.device.startswith("cuda") and versions["torch"]:
        try:
            environment["gpu"] = describe_gpu(args.device)
        except (AssertionError, RuntimeError) as error:  # PyTorch without CUDA, or no GPU
            problems.append(f"no GPU: {error}")
    print(json.dumps(environment | {"problems": problems}, indent=2))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
