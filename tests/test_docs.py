"""The handwritten pages: links lead somewhere, named files exist, and the example of the README runs."""

import re
from pathlib import Path

import pytest
import yaml

from deployments.config import AppSettings
from parse.config import EngineSettings

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "bench" / "RESULTS.md",
    *(ROOT / "docs").glob("*.md"),
    *ROOT.glob("models/*/README.md"),
]
FOLDERS = "parse", "deployments", "training", "bench", "cluster", "tests", "docs", "models"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", page.read_text()):
        assert (ROOT / name).exists(), name


def readme_example(language: str) -> str:
    (example,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return str(example)


def test_the_configuration_in_the_readme_is_valid():
    (application,) = yaml.safe_load(readme_example("yaml"))["applications"]
    settings = AppSettings.model_validate(application["args"])
    assert isinstance(settings.draft, EngineSettings)


def test_the_library_example_in_the_readme_runs(capsys):
    exec(compile(readme_example("python"), "README.md", "exec"), {})
    answer, _, summary = capsys.readouterr().out.strip().rpartition("\n")
    assert "Ben" in answer.splitlines()[-1]
    assert re.fullmatch(r"\d+ of \d+ draft tokens accepted", summary)
