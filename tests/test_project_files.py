"""The Makefile, the CI workflow, the pre-commit hooks and the pages for contributors agree with each other."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import playground
from deployments.api.limits import UNAUTHENTICATED_PATHS
from deployments.config import ApiSettings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
WORKFLOW: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
VERSIONS = [
    line.rpartition(" ")[2]
    for line in PROJECT["project"]["classifiers"]
    if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
]


def commands_of(target: str, *variables: str) -> list[str]:
    """What make would run, without running it. An installed environment is assumed."""
    stamp = next((value.partition("=")[2] for value in variables if value.startswith("VENV=")), ".venv")
    process = subprocess.run(
        ["make", "--dry-run", f"--old-file={stamp}/.installed", target, *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in process.stdout.splitlines() if not line.startswith("make")]


def make_calls(text: str) -> list[str]:
    """The targets that a script calls make with."""
    return [target for call in re.findall(r"\bmake\b([^\n;&|]*)", text) for target in re.findall(r"\b[a-z]+\b", call)]


def steps_that_run() -> list[tuple[str, str]]:
    return [(name, step["run"]) for name, job in JOBS.items() for step in job["steps"] if "run" in step]


def test_help_lists_every_target():
    printed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in printed.splitlines()} == TARGETS
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == TARGETS


@pytest.mark.parametrize("target", ["lint", "check", "unit", "test", "wheel"])
def test_the_interpreter_and_the_environment_can_be_chosen(target):
    commands = commands_of(target, "PYTHON=python3.13", "VENV=.venv-3.13")
    assert any(command.startswith(".venv-3.13/bin/") for command in commands)
    assert not any(re.search(r"\.venv(?!-3\.13)", command) for command in commands)


def test_an_environment_is_created_with_the_chosen_interpreter(tmp_path):
    process = subprocess.run(
        ["make", "--dry-run", "setup", "PYTHON=python3.13", f"VENV={tmp_path}/environment"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"python3.13 -m venv {tmp_path}/environment" in process.stdout
    assert f"{tmp_path}/environment/bin/python -m pip install" in process.stdout


def test_check_is_lint_and_the_tests_without_a_slow_marker():
    pytest_command = ".venv/bin/python -m pytest --numprocesses logical"
    assert commands_of("check") == [*commands_of("lint"), f'{pytest_command} -m "not ray and not slow"']
    assert commands_of("test")[-1] == pytest_command
    markers = {marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert markers == {"cuda", "exhaustive", "ray", "real", "slow"}


def test_the_pre_commit_hooks_are_the_checks_of_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == commands_of("lint")
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in repository["hooks"])


def test_the_workflow_calls_only_targets_that_exist():
    calls = {job: make_calls(script) for job, script in steps_that_run()}
    assert calls == {"lint": ["lint"], "unit": ["unit"], "test": ["test"], "wheel": ["wheel"]}
    assert {target for targets in calls.values() for target in targets} <= TARGETS


def test_the_workflow_runs_the_unit_tests_on_every_supported_version():
    assert JOBS["unit"]["strategy"]["matrix"]["python-version"] == VERSIONS == ["3.11", "3.12", "3.13"]
    assert PROJECT["project"]["requires-python"] == f">={VERSIONS[0]}"


def test_the_workflow_uploads_the_wheel_that_make_builds():
    (upload,) = [step for step in JOBS["wheel"]["steps"] if "upload-artifact" in step.get("uses", "")]
    assert upload["with"]["path"] == "dist/*.whl" and upload["with"]["if-no-files-found"] == "error"
    assert "--wheel-dir dist" in commands_of("wheel")[-1]


def test_the_workflow_installs_the_cpu_builds_of_pytorch_and_has_no_more_rights_than_it_needs():
    assert WORKFLOW["env"] == {"PIP_EXTRA_INDEX_URL": "https://download.pytorch.org/whl/cpu"}
    assert WORKFLOW["permissions"] == {"contents": "read"}


def test_the_page_for_contributors_names_only_targets_that_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"(?:`|^)make ([a-z-]+)", page, re.MULTILINE)
    assert named and set(named) <= TARGETS


def test_the_security_page_names_every_path_that_needs_no_key_and_the_limits():
    page = (ROOT / "SECURITY.md").read_text()
    paths = UNAUTHENTICATED_PATHS - playground.PATHS
    assert paths and all(f"`{path}`" in page for path in paths)
    assert ApiSettings().max_body_bytes == 2 * 2**20 and "2 MiB by default" in page
    named = set(re.findall(r"`((?:max|min|body|request)_\w+)`", page))
    assert named and named <= set(ApiSettings.model_fields)
