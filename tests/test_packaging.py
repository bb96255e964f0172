"""What is installed with the project, and what the wheel contains."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from email import message_from_string
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages  # type: ignore[import-untyped]

from deployments.api.routes import create_app
from deployments.config import ApiSettings
from parse.config import EngineSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET, EXAMPLE_PROMPT
from parse.pair import Pair
from tests.deployments.live import LocalBackend, served

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
pytestmark = pytest.mark.slow

OURS = ("parse", "deployments", "training", "bench")
BUILD = """
import sys
from setuptools.build_meta import build_sdist, build_wheel
folder = sys.argv[1]  # the builds change sys.argv
build_sdist(folder)
build_wheel(folder)
"""
FILES_OF_A_MODEL = {".json", ".safetensors", ".jinja", ".md"}


def needed(name: str, extras: frozenset[str], packages: dict[str, set[str]]) -> None:
    """Everything that an installation brings, and for each thing who asks for it."""
    for line in requires(name) or ():
        requirement = Requirement(line)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            continue
        other = canonicalize_name(requirement.name)
        seen = other in packages
        packages.setdefault(other, set()).add(name)
        if not seen:
            try:
                needed(other, frozenset(requirement.extras), packages)
            except PackageNotFoundError:
                assert other != "parse"


def test_nothing_we_need_brings_the_unrelated_project_called_parse():
    packages: dict[str, set[str]] = {}
    needed("parse-serve", frozenset({"dev"}), packages)
    assert {"torch", "transformers", "ray", "pydantic", "openai"} <= packages.keys()
    assert "parse" not in packages, f"wanted by {packages.get('parse')}"
    lock = (ROOT / "requirements.lock").read_text()
    pinned = {str(canonicalize_name(name)) for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    assert "parse" not in pinned
    # The tools of pip itself are no part of its list.
    assert packages.keys() - {"parse-serve", "setuptools"} <= pinned


def test_every_package_of_ours_is_installed():
    present = {
        ".".join(folder.relative_to(ROOT).parts[:-1]) for ours in OURS for folder in (ROOT / ours).rglob("__init__.py")
    }
    included = find_packages(str(ROOT), include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
    assert present == set(included)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution. They are built from a copy, because a build leaves files."""
    folder = tmp_path_factory.mktemp("dist")
    copy = folder / "project"
    for name in (*OURS, "models"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=copy, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    (file,) = distributions.glob("*.whl")
    return Path(file)


def test_a_wheel_contains_every_module_and_every_file_that_is_read_or_served(wheel):
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for ours in OURS for path in (ROOT / ours).rglob("*.py")}
    expected |= {"parse/py.typed", "deployments/serve_config.yaml"}
    expected |= {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "deployments/playground").iterdir()
        if path.suffix in (".html", ".css", ".js", ".svg")
    }
    expected |= {path.relative_to(ROOT).as_posix() for ours in OURS for path in (ROOT / ours).rglob("*.lock")}
    expected |= {
        f"parse/demo_models/{path.relative_to(ROOT / 'models').as_posix()}"
        for path in (ROOT / "models").rglob("*")
        if path.suffix in FILES_OF_A_MODEL
    }
    assert packed == expected


def test_the_metadata_name_the_license_and_the_versions_of_python(wheel):
    archive = ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_string(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert versions | {"Development Status :: 3 - Alpha"} <= set(metadata.get_all("Classifier", []))
    text = archive.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_a_source_distribution_contains_all_that_the_wheel_is_built_from(distributions):
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
    models = {path.relative_to(ROOT).as_posix() for path in (ROOT / "models").rglob("*") if path.is_file()}
    assert models | {"setup.py", "pyproject.toml", "serve_config.yaml", "LICENSE", "README.md"} <= packed


@pytest.fixture(scope="module")
def installed_python(tmp_path_factory, wheel) -> Path:
    """The interpreter of an environment with the wheel. The dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    report = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True
    )
    packages = Path(report.stdout.decode().strip())
    # A line of a .pth file adds a folder, but not the editable installation that the folder's own .pth files set up.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", packages, wheel], check=True, timeout=120)
    return python


def run_installed(python: Path, folder: Path, *arguments: str, standard_input: str = "") -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [python, *arguments],
        cwd=folder,
        env=environment,
        input=standard_input,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_an_installed_wheel_answers_with_the_demo_pair(installed_python, tmp_path):
    answer = run_installed(installed_python, tmp_path, "-m", "parse", "--mode", "off", EXAMPLE_PROMPT)
    assert "Ben has the record" in answer and "mode off" in answer


def test_an_installed_wheel_serves_its_own_configuration_from_any_folder(installed_python, tmp_path):
    """All that `python -m deployments` without arguments does before it starts Ray, and what its replicas load."""
    script = """
import deployments, json
from deployments.__main__ import parse_arguments
from deployments.app import build
from deployments.launch import check_model_folders, read_config
from parse.config import EngineSettings
from deployments.reference import list_deployments
path = parse_arguments([]).config
config, settings = read_config(path)
for name in ("target", "draft"):
    check_model_folders(name, getattr(settings, name))
models = [
    model
    for deployment in list_deployments(build(settings))
    for engine in deployment.init_args
    if isinstance(engine, EngineSettings)
    for model in (engine.model, *(config.model for config in engine.speculative_configs if config.model))
]
print(json.dumps([deployments.__file__, str(path), *models]))
"""
    output = run_installed(installed_python, tmp_path, "-c", script).splitlines()[-1]
    paths = [Path(path) for path in re.findall(r'"([^"]+)"', output)]
    assert all(path.is_relative_to(installed_python.parents[1]) and path.exists() for path in paths), paths
    assert {path.name for path in paths[2:]} == {path.name for path in (ROOT / "models").iterdir()}


def test_all_examples_pass_with_an_installed_wheel(installed_python, tmp_path):
    """They run one after the other in one process. The service for the client runs in the process of this test."""
    examples = shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    script = """
import runpy, sys
for line in sys.stdin.read().splitlines():
    sys.argv = line.split("\t")
    print("example:", sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
    settings = EngineSettings(model=DEMO_TARGET, num_threads=1, max_model_len=1024, kv_cache_memory_bytes=256 * 2**20)
    with Pair(settings) as pair, served(create_app(LocalBackend(pair.pipeline), ApiSettings(), "demo-target")) as url:
        arguments = {
            "openai_client.py": ("--url", url),
            "your_own_pair.py": (DEMO_TARGET, DEMO_DRAFT, EXAMPLE_PROMPT),
        }
        names = sorted(path.name for path in examples.glob("*.py"))
        lines = ["\t".join((name, *arguments.get(name, ()))) for name in names]
        output = run_installed(installed_python, examples, "-c", script, standard_input="\n".join(lines))
    assert re.findall("^example: (.+)$", output, re.MULTILINE) == names and len(names) == 7
