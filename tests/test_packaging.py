"""What is installed with us."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    assert there == set(PROJECT["tool"]["setuptools"]["packages"])
