"""What is installed with us."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = ("parse", "deployments", "training", "bench")


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


def test_a_wheel_holds_all_that_runs(tmp_path):
    """Of each package every module, and what lies beside them and is read or served."""
    copy = tmp_path / "project"  # a build leaves things behind
    for ours in OURS:
        shutil.copytree(ROOT / ours, copy / ours, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for ours in OURS for path in (ROOT / ours).rglob("*.py")}
    expected |= {"parse/py.typed"}
    expected |= {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "deployments/playground").iterdir()
        if path.suffix in (".html", ".css", ".js", ".svg")
    }
    assert packed == expected
