"""Checks the Dockerfile without building an image."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field

import pytest
from packaging.utils import canonicalize_name

from deployments.config import PROJECT_ROOT
from deployments.launch import read_config
from parse.engines.vllm import installation

CLUSTER = PROJECT_ROOT / "cluster"
DOCKERFILE = CLUSTER / "Dockerfile"
INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str
    flags: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        return shlex.split(self.rest)


def parsed(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    parsed_instructions = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, rest = line.partition(" ")
        flags = {}
        while flag := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
            flags[flag[1]] = flag[2]
            rest = rest[flag.end() :]
        parsed_instructions.append(Instruction(name, rest, flags))
    return parsed_instructions


@pytest.fixture(scope="module")
def instructions() -> list[Instruction]:
    return parsed(DOCKERFILE.read_text())


def of(instructions, name):
    return [instruction for instruction in instructions if instruction.name == name]


def test_the_parser_joins_lines_and_reads_flags():
    text = 'FROM a:1\n# no\nRUN x \\\n    # nor this\n    && y\nHEALTHCHECK --interval=1s --retries=3 CMD ["z"]\n'
    first, second, third = parsed(text)
    assert (first.name, first.rest) == ("FROM", "a:1")
    assert second.rest == "x && y"
    assert third.flags == {"interval": "1s", "retries": "3"} and third.rest == 'CMD ["z"]'


def test_the_dockerfile_has_known_instructions_and_one_base_with_a_full_version(instructions):
    assert {instruction.name for instruction in instructions} <= INSTRUCTIONS
    assert instructions[0].name == "FROM" and len(of(instructions, "FROM")) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", instructions[0].rest)


def test_all_copied_files_exist(instructions):
    for instruction in of(instructions, "COPY"):
        *sources, target = instruction.words
        assert all((PROJECT_ROOT / source).exists() for source in sources), instruction
        assert len(sources) == 1 or target.endswith("/")


def test_every_package_and_the_demo_pair_are_copied(instructions):
    copied = {source for instruction in of(instructions, "COPY") for source in instruction.words[:-1]}
    setuptools = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {pattern.rstrip("*") for pattern in setuptools["packages"]["find"]["include"]} <= copied
    assert {"models", "cluster", "serve_config.yaml", "requirements.lock", "pyproject.toml"} <= copied


def test_the_image_installs_the_pinned_dependencies(instructions):
    (dependencies, _, package) = (run for run in of(instructions, "RUN") if "pip install" in run.rest)
    assert "--constraint requirements.lock" in dependencies.rest
    assert "--no-deps" in package.rest
    lock = (PROJECT_ROOT / "requirements.lock").read_text().splitlines()
    pinned = {str(canonicalize_name(line.partition("==")[0])) for line in lock}
    script = re.search(r"python -c '([^']*)'", dependencies.rest)
    assert script
    requirements = subprocess.run(
        [sys.executable, "-c", script[1]], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    names = {str(canonicalize_name(re.split(r"[^A-Za-z0-9_-]", line)[0])) for line in requirements.stdout.splitlines()}
    assert {"torch", "ray", "transformers"} <= names <= pinned


def test_vllm_is_installed_only_on_request_and_where_the_configs_expect_it(instructions):
    (install,) = (run.rest for run in of(instructions, "RUN") if "vllm" in run.rest)
    assert install.startswith('if [ -n "$VLLM_VERSION" ]; then ')
    (python,) = re.findall(r"executable: (\S+)", (CLUSTER / "serve_vllm.yaml").read_text())[:1]
    assert f"-m venv {python.removesuffix('/bin/python')} " in install
    assert f"VLLM_VERSION={installation.NEWEST}\n" in DOCKERFILE.read_text()  # the example names a tested version


def test_the_image_contains_no_secret_and_does_not_run_as_root(instructions):
    assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)\w*[= ]", "\n".join(i.rest for i in of(instructions, "ENV")))
    assert {arg.rest.partition("=")[0] for arg in of(instructions, "ARG")} == {"TORCH_INDEX", "VLLM_VERSION"}
    (user,) = of(instructions, "USER")
    assert user.rest == "1000"
    assert instructions.index(user) < instructions.index(of(instructions, "CMD")[0])


def test_the_image_serves_and_has_a_health_check(instructions):
    (command,), (check,), (port,) = (of(instructions, name) for name in ("CMD", "HEALTHCHECK", "EXPOSE"))
    python, flag, module, config = json.loads(command.rest)
    assert (python, flag, module) == ("python", "-m", "deployments")
    served, _ = read_config(PROJECT_ROOT / config)
    assert served["http_options"] == {"host": "0.0.0.0", "port": int(port.rest)}
    health_check = json.loads(check.rest.removeprefix("CMD "))
    compile(health_check[2], "HEALTHCHECK", "exec")
    assert f":{port.rest}/health" in health_check[2]


def test_the_dockerfile_says_that_it_is_untried():
    assert DOCKERFILE.read_text().startswith("# NOT TRIED")
