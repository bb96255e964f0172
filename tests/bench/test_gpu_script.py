"""bench/gpu.sh runs its parts independently, within its time limit, and needs few files and libraries."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires

import pytest

from bench import gpu_environment
from training.provenance import PROJECT_ROOT

SCRIPT = PROJECT_ROOT / "bench" / "gpu.sh"
MAX_BYTES = 60 * 2**20
# A fake interpreter. It records its arguments, writes figures for each shape, and ends as the name of the shape says.
INTERPRETER = """#!/bin/sh
echo "$*" >>"$CALLS"
all=$*
while [ $# -gt 0 ]; do
    if [ "$1" = --json ]; then echo '{"figures": 1}' >"$2"; fi
    shift
done
case $all in
*"--shape fails"*) echo "it failed"; exit 3 ;;
*"--shape hangs"*) sleep 60 ;;
*"--shape"*) echo "toy with random weights" ;;
esac
"""


@pytest.fixture
def run_script(tmp_path):
    """Returns a function that runs the script with a fake interpreter."""
    interpreter, calls = tmp_path / "python", tmp_path / "calls"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    calls.touch()
    folder = tmp_path / "figures"

    def run(*arguments):
        process = subprocess.run(
            [str(SCRIPT), *arguments[:-1], str(folder), *arguments[-1]],
            env=os.environ | {"PYTHON": str(interpreter), "CALLS": str(calls)},
            capture_output=True,
            text=True,
        )
        summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else None
        return process, summary, folder, calls.read_text().splitlines()

    return run


def exit_codes(summary):
    return {part["part"]: part["exit_code"] for part in summary["parts"]}


def test_the_parts_run_in_order_and_get_the_arguments(run_script):
    process, summary, folder, calls = run_script("--device", "cpu", "--shapes", "one,two", ["--", "--rounds", "2"])
    assert process.returncode == 0, process.stderr
    assert list(exit_codes(summary).items()) == [("environment", 0), ("tests", 0), ("one", 0), ("two", 0)]
    environment, tests, one, two = calls
    assert environment == "-m bench.gpu_environment --device cpu"
    assert tests.startswith("-m pytest ") and "-m cuda" in tests
    for shape, call in (("one", one), ("two", two)):
        assert call.startswith(f"-m bench.gpu --shape {shape} --device cpu") and call.endswith(" --rounds 2")
        assert json.loads((folder / f"{shape}.json").read_text()) == {"figures": 1}
        assert "toy with random weights" in (folder / f"{shape}.log").read_text()
    assert process.stdout.count("toy with random weights") == 2


def test_by_default_two_shapes_are_measured_on_a_gpu_in_eight_minutes(run_script):
    _, summary, _, calls = run_script([])
    assert list(exit_codes(summary)) == ["environment", "tests", "qwen3-8b", "qwen3-32b"]
    assert summary["limit_s"] == 480
    assert all("--device cuda" in call for call in calls if "pytest" not in call)


def test_a_part_that_fails_does_not_affect_the_others(run_script):
    process, summary, folder, _ = run_script("--shapes", "fails,one", [])
    assert process.returncode == 1
    assert exit_codes(summary) == {"environment": 0, "tests": 0, "fails": 3, "one": 0}
    assert "fails: exit code 3" in process.stdout and "it failed" in process.stdout
    assert (folder / "one.json").exists()


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_figures(run_script):
    process, summary, folder, _ = run_script("--limit", "16", "--shapes", "hangs,one,two", [])
    assert process.returncode == 1
    assert exit_codes(summary) == {"environment": 0, "tests": 0, "hangs": 124, "one": 0, "two": 0}
    assert json.loads((folder / "hangs.json").read_text()) == {"figures": 1}


def test_a_part_for_which_no_time_is_left_does_not_start(run_script):
    process, summary, _, calls = run_script("--limit", "1", "--shapes", "one", [])
    assert process.returncode == 1 and calls == []
    assert exit_codes(summary) == {"environment": 124, "tests": 124, "one": 124}


@pytest.mark.parametrize(
    "arguments", [["--shapes"], ["--shapes", "one;two"], ["--limit", "soon"], ["--fast"], ["a", "b"], ["--shapes", ""]]
)
def test_wrong_arguments_are_rejected(arguments, tmp_path):
    process = subprocess.run([str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.startswith("gpu.sh: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_script_can_be_tried_without_a_gpu(tmp_path):
    """An unknown shape comes first. It fails, and everything else is measured."""
    options = "--device cpu --shapes unknown,tiny --limit 580"  # a busy machine takes longer
    sizes = "--context 40 --batches 1,2 --drafts 20 --rounds 1 --decode-tokens 4"
    process = subprocess.run(
        [str(SCRIPT), *options.split(), str(tmp_path), "--", *sizes.split()],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert exit_codes(summary) == {"environment": 0, "tests": 0, "unknown": 2, "tiny": 0}
    environment = json.loads((tmp_path / "environment.log").read_text())
    assert environment["problems"] == [] and environment["older_than_required"] == {}
    assert re.search(r"\d+ skipped", (tmp_path / "tests.log").read_text())
    figures = json.loads((tmp_path / "tiny.json").read_text())
    assert figures["errors"] == {} and figures["cuda_graphs"]["fused_call"]["accepted_tokens"] == 16
    assert "tiny with random weights" in process.stdout


def test_the_repository_has_at_most_60_mib():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    files = [PROJECT_ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(files) > 100
    assert sum(file.stat().st_size for file in files if file.exists()) <= MAX_BYTES


def test_missing_and_old_libraries_are_named(monkeypatch, capsys):
    versions = {"torch": "2.11.0+cu130", "transformers": "5.99", "pydantic": None}
    monkeypatch.setattr(gpu_environment, "library_versions", lambda: versions)
    monkeypatch.setattr(sys, "argv", ["gpu_environment", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        gpu_environment.main()
    assert ended.value.code == 1
    environment = json.loads(capsys.readouterr().out)
    assert environment["problems"] == ["missing packages: pydantic"]
    required = re.search(r'"torch>=([\d.]+)"', (PROJECT_ROOT / "pyproject.toml").read_text())
    assert required and environment["older_than_required"] == {"torch": required[1]}


def requirements_of(packages):
    """Returns these packages and all that they require, without extras."""
    closure, remaining = set(), list(packages)
    while remaining:
        package = normalized(remaining.pop())
        if package not in closure:
            closure.add(package)
            requirements = [each for each in requires(package) or () if "extra ==" not in each]
            remaining += [name for each in requirements if (name := requirement_name(each)) in INSTALLED]
    return closure


def requirement_name(requirement):
    match = re.match(r"[\w.-]+", requirement)
    assert match
    return normalized(match[0])


def normalized(package):
    return re.sub(r"[-_.]+", "-", package).lower()


INSTALLED = {normalized(package) for packages in packages_distributions().values() for package in packages}


@pytest.mark.slow
def test_the_parts_need_no_other_libraries_than_those_that_are_listed(tmp_path):
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    available = requirements_of(gpu_environment.LIBRARIES.values())
    unlisted = {requirement_name(each) for each in named} - available - {"parse-serve"}
    assert {"ray", "fastapi", "matplotlib"} <= unlisted
    modules = [
        module
        for module, packages in packages_distributions().items()
        if {normalized(package) for package in packages} <= unlisted
    ]
    program = f"""
import sys
sys.modules.update(dict.fromkeys({modules!r}))  # importing one of them raises ImportError
import bench.gpu
import pytest
sys.exit(pytest.main("--collect-only -q -p no:cacheprovider -m cuda tests/parse/engines/native".split()))
"""
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "test_cuda_graphs.py" in process.stdout
