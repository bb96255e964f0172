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

HOUSE = Path(__file__).parents[1]
PROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text())
OURS = ("parse", "deployments", "training", "bench")


def needed(name: str, extras: frozenset[str], found: dict[str, set[str]]) -> None:
    """Everything that an installation brings, and for each thing who asks for it."""
    for line in requires(name) or ():
        wanted = Requirement(line)
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            continue
        other = canonicalize_name(wanted.name)
        known = other in found
        found.setdefault(other, set()).add(name)
        if not known:
            try:
                needed(other, frozenset(wanted.extras), found)
            except PackageNotFoundError:
                assert other != "parse"


def test_nothing_we_need_brings_the_unrelated_project_called_parse():
    found: dict[str, set[str]] = {}
    needed("parse-serve", frozenset({"dev"}), found)
    assert {"torch", "transformers", "ray", "pydantic", "openai"} <= found.keys()
    assert "parse" not in found, f"wanted by {found.get('parse')}"
    lock = (HOUSE / "requirements.lock").read_text()
    pinned = {str(canonicalize_name(name)) for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    assert "parse" not in pinned
    # The tools of pip itself are no part of its list.
    assert found.keys() - {"parse-serve", "setuptools"} <= pinned


def test_every_package_of_ours_is_installed():
    there = {
        ".".join(folder.relative_to(HOUSE).parts[:-1])
        for ours in OURS
        for folder in (HOUSE / ours).rglob("__init__.py")
    }
    included = find_packages(str(HOUSE), include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
    assert there == set(included)


def test_a_wheel_holds_all_that_runs(tmp_path):
    """Of each package every module, and what lies beside them and is read or served."""
    house = tmp_path / "house"  # a build leaves things behind
    for ours in OURS:
        shutil.copytree(HOUSE / ours, house / ours, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(HOUSE / name, house / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=house, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {path.relative_to(HOUSE).as_posix() for ours in OURS for path in (HOUSE / ours).rglob("*.py")}
    wanted |= {"parse/py.typed"}
    wanted |= {
        path.relative_to(HOUSE).as_posix()
        for path in (HOUSE / "deployments/playground").iterdir()
        if path.suffix in (".html", ".css", ".js", ".svg")
    }
    assert held == wanted
