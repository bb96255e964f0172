"""Controls the playground in a real browser, as a user does.

`.venv/bin/python -m tests.deployments.browser docs/images` takes the screenshots in docs/playground.md.
"""

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

BROWSER, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
MISSING = next((f"{path} is not installed (make tools)" for path in (BROWSER, DRIVER) if not path.exists()), None)
PATIENCE_S = 30
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --window-size=1440,1000"
).split()


@contextmanager
def browsing(*flags: str) -> Iterator[Chrome]:
    with tempfile.TemporaryDirectory(prefix="playground-") as profile:
        options = ChromeOptions()
        options.binary_location = str(BROWSER)
        for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = Chrome(
            options=options, service=Service(str(DRIVER))
        )  # both paths are set, so that Selenium downloads nothing
        try:
            yield browser
        finally:
            browser.quit()


@dataclass(frozen=True)
class Playground:
    browser: Chrome

    def open(self, address: str) -> None:
        self.browser.get(f"{address}/")
        self.until(lambda: self.one("#model").text != "…", "the page asks which model there is")

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> Sequence[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def until(self, true: Callable[[], Any], what: str) -> Any:
        return WebDriverWait(self.browser, PATIENCE_S, poll_frequency=0.05).until(lambda _: true(), what)

    def write(self, selector: str, text: str) -> None:
        field = self.one(selector)
        if not field.is_displayed():
            self.run("arguments[0].closest('details').open = true", field)
        field.clear()
        field.send_keys(text)

    def put(self, selector: str, text: str) -> None:
        """Sets a text that cannot be typed on a keyboard."""
        self.run("arguments[0].value = arguments[1]", self.one(selector), text)

    def choose(self, selector: str, value: str) -> None:
        self.one(f"{selector} option[value='{value}']").click()

    def ask(
        self,
        prompt: str | None = None,
        *,
        mode: str = "full",
        against: str | None = None,
        methods: tuple[str, str] | None = None,
    ) -> None:
        if prompt is not None:
            self.put("#question", prompt)
        self.choose("#mode", mode)
        if self.one("#compare").is_selected() != (against is not None):
            self.one("#compare").click()
        if against is not None:
            self.choose("#mode-b", against)
        for field, method in zip(("#method", "#method-b"), methods or (), strict=False):
            self.choose(field, method)
        self.one("#ask").click()

    def ended(self) -> Sequence[str]:
        """Waits until all answers have ended, and returns their states."""
        return self.until(
            lambda: (
                (states := self.run("return [...document.querySelectorAll('.pane')].map(p => p.dataset.state)"))
                and not {"waiting", "sent", "generating"} & set(states)
                and states
            ),
            "the answers end",
        )

    def runs(self, pane: int = 0) -> list[tuple[str, str]]:
        """Returns kind and text of each run of an answer."""
        script = """return [...document.querySelectorAll('.pane')[arguments[0]]?.querySelectorAll('.run') ?? []]
            .map(r => [['accepted', 'target', 'rejected'].find(k => r.classList.contains(k)), r.textContent])"""
        return [(kind, text) for kind, text in self.run(script, pane)]

    def report(self, name: str, pane: int = 0) -> str:
        script = "return document.querySelectorAll('.pane')[arguments[0]].querySelector(arguments[1])?.textContent"
        return str(self.run(script, pane, f"[data-report={name}]"))

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def console(self) -> list[str]:
        entries: list[dict[str, Any]] = self.browser.get_log("browser")
        return [str(entry["message"]) for entry in entries if entry["level"] == "SEVERE"]


ASK, BACK = Keys.CONTROL + Keys.ENTER, Keys.SHIFT + Keys.TAB


def pictures(folder: Path, address: str) -> None:
    """Takes screenshots of two modes side by side, in both themes.

    The target generates one token per pass, so the comparison shows what drafts alone save. On a busy machine the
    pictures show unusual times.
    """
    methods = ("none", "none")
    for theme in ("light", "dark"):
        with browsing("--force-device-scale-factor=1.5") as browser:
            page = Playground(browser)
            page.open(address)
            while page.one("#theme-name").text != theme:
                page.one("#theme").click()
            # After this answer all code has run once, so the times are representative.
            page.ask(mode="rounds", against="off", methods=methods)
            page.ended()
            page.open(address)
            page.write("#full", "0.97")
            page.write("#prefix", "0.93")
            for mode, against in (("full", "off"), ("rounds", None)):
                for example in page.all(".example"):
                    example.click()
                    page.ask(mode=mode, against=against, methods=methods)
                    page.ended()
            page.all(".example")[1].click()
            page.ask(mode="full", against="off", methods=methods)
            page.ended()
            page.run("document.activeElement.blur(); scrollTo(0, 0)")
            inner_height, scroll_height = page.run("return [innerHeight, document.documentElement.scrollHeight]")
            browser.set_window_size(1440, browser.get_window_size()["height"] + max(0, scroll_height - inner_height))
            picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            few = picture.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            few.save(folder / f"playground-{theme}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.deployments.browser")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--url", help="a server that serves the demo pair; else one is started in this process")
    args = parser.parse_args()
    if args.url:
        pictures(args.folder, args.url)
        return
    from deployments.api.routes import create_app
    from deployments.config import ApiSettings
    from parse.demo import DEMO_DRAFT, DEMO_TARGET
    from parse.pair import Pair
    from tests.deployments.conftest import MODEL, SPECULATIVE_CONFIGS, settings
    from tests.deployments.live import LocalBackend, served

    with (
        Pair(settings(DEMO_TARGET, *SPECULATIVE_CONFIGS), settings(DEMO_DRAFT)) as pair,
        served(create_app(LocalBackend(pair.pipeline), ApiSettings(), MODEL)) as address,
    ):
        pictures(args.folder, address)


if __name__ == "__main__":
    main()
