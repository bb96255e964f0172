"""The examples of CONTRIBUTING.md: added to a copy of the project as the page says, each of them works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "contributing_program.py"
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
# The first line of an example is a comment with the file, and for a registration the table or function in that file.
EXAMPLES = re.findall(r"```python\n# (\S+\.py)(?:, in (\w+))?\n(.*?)```", PAGE, re.DOTALL)


def register(path: Path, place: str, code: str) -> None:
    """Adds entries to the start of a table, or statements before the `return` of a function, and their imports."""
    source = path.read_text()
    imports = "".join(re.findall(r"^from .*\n", code, re.MULTILINE))
    lines = code.removeprefix(imports).lstrip("\n")
    table = re.search(rf"^{place}\b.* = {{\n", source, re.MULTILINE)
    function = re.search(rf"^def {place}\(.*?(?=^    return )", source, re.MULTILINE | re.DOTALL)
    match = table or function
    assert match, place
    source = source[: match.end()] + lines + source[match.end() :]
    path.write_text(re.sub(r"^(?=from )", imports, source, count=1, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def extended_project(tmp_path_factory) -> Path:
    """A copy of the project with all examples of the page."""
    copy = tmp_path_factory.mktemp("extended")
    for package in ("parse", "deployments"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "models").symlink_to(ROOT / "models")
    for file in (ROOT / "pyproject.toml", PROGRAM):
        shutil.copy(file, copy)
    for name, place, code in EXAMPLES:
        if place:
            register(copy / name, place, code)
        else:
            assert not (copy / name).exists(), name
            (copy / name).write_text(code)
    return copy


def run(folder: Path, program: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, program], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def results(extended_project) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(run(extended_project, PROGRAM.name).splitlines()[-1])
    return report


def test_every_python_example_on_the_page_is_tested():
    assert len(EXAMPLES) == PAGE.count("```python") == 8


def test_a_method_of_one_file_and_one_entry_proposes_tokens_and_keeps_the_text(results):
    assert "Ben" in results["off"]["text"].splitlines()[-1] and results["off"]["proposed"] == 0
    assert results["method"]["text"] == results["off"]["text"] and results["method"]["proposed"] > 0


def test_a_mode_of_one_file_and_one_entry_answers_and_can_be_the_mode_of_auto(results):
    short, long = results["mode"], results["long"]
    assert short["mode"] == long["mode"] == results["auto"]["mode"] == "cautious"
    assert 0 < short["drafted"] <= 128 < long["drafted"]
    assert short["accepted"] > 0 and short["text"]
    # Of a long draft only the target's own tokens are accepted, so the answer is the target's.
    assert long["text"] == results["off"]["text"] and 0 < long["accepted"] < long["drafted"]


def test_an_endpoint_of_one_file_and_one_line_has_the_checks_of_the_others(results):
    tokens = results["tokens"]
    assert results["endpoint"] == {"status": 200, "count": len(tokens), "max_model_len": 512, "tokens": tokens}
    assert results["invalid"]["status"] == 400 and results["invalid"]["error"]["param"] == "prompt"
    assert results["without key"]["status"] == 401


def test_an_engine_of_one_file_serves_a_pipeline(extended_project, results):
    *answer, summary = run(extended_project, "try_plain_engine.py").splitlines()
    numbers = re.fullmatch(r"(\d+) of (\d+) draft tokens accepted", summary)
    assert numbers and 0 < int(numbers[1]) < int(numbers[2])
    assert answer[0] == "Step 1: Uma 73 > 27, top Uma 73."  # from the draft
    assert "Jack 74 < 73" not in "\n".join(answer)  # the error in the draft
    assert answer[-1] == results["off"]["text"].splitlines()[-1]
