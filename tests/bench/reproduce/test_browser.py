"""The report in a real browser: every figure is a link to a command, and nothing is loaded from elsewhere."""

import re
from typing import Any

import pytest

from bench.reproduce.html_report import render_html
from bench.reproduce.report import build_report
from tests.bench.reproduce.documents import invented_run

pytestmark = pytest.mark.slow

FIGURES_SCRIPT = """
return [...document.querySelectorAll('section')].slice(0, 9).flatMap(section => [...section.querySelectorAll('td')]
    .map(cell => ({
        text: cell.innerText,
        section: section.querySelector('h2').innerText,
        commands: [...cell.querySelectorAll('a')].map(link => [
            document.querySelector(link.getAttribute('href'))?.querySelector('pre')?.innerText ?? null, link.title]),
    })))
"""
# Computed by hand from the invented run.
EXPECTED = (
    *("2.00 (1.00 to 3.00)", "5.00", "16.00", "7.60", "1.25", "0.75", "0.95", "0.38", "8.80"),
    *("600 ms", "1.30 s", "321", "96.0% (86 to 99)", "75.0%", "92.0%", "3.00 points", "1.00 to 5.00", "0.031"),
    *("-10.0%", "+10.0%", "±10%"),
)


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(render_html(build_report(invented_run())), encoding="utf-8")
    browser.get(file.as_uri())
    return browser


def test_every_figure_links_to_the_command_that_measured_it(opened):
    cells: list[dict[str, Any]] = opened.execute_script(FIGURES_SCRIPT)
    figures = [cell for cell in cells if re.search(r"\d\.\d|\d ?%|\d ms", cell["text"])]
    assert len(figures) > 100
    for cell in figures:
        assert cell["commands"], cell
        for command, title in cell["commands"]:
            assert command is not None and re.match(r"python -m bench\.(load|quality) ", command), cell
            assert command == title


def test_the_figures_are_those_of_the_run(opened):
    texts = {cell["text"].replace("÷", "") for cell in opened.execute_script(FIGURES_SCRIPT)}
    assert set(EXPECTED) <= texts


def test_a_click_on_a_figure_leads_to_its_command(opened):
    link = opened.find_element("css selector", "td a")
    target = link.get_attribute("href").partition("#")[2]
    link.click()
    script = "const r = document.getElementById(arguments[0]).getBoundingClientRect(); return [r.top, innerHeight]"
    top, height = opened.execute_script(script, target)
    assert 0 <= top < height


def test_the_report_loads_nothing_and_has_no_errors(opened):
    opened.refresh()
    resources = opened.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    errors = [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"]
    assert resources == [] and errors == []
    assert opened.execute_script("return document.scripts.length") == 0


def test_wide_tables_scroll_on_small_screens(opened):
    opened.set_window_size(500, 900)
    is_wide = opened.execute_script("return document.documentElement.scrollWidth > innerWidth")
    opened.set_window_size(1440, 1000)
    assert not is_wide
