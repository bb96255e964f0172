"""Tests the playground in a real browser, with the demo pair and faulty servers."""

import asyncio
import json
import re
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from deployments import playground
from deployments.api.admission import Overloaded
from deployments.api.routes import create_app
from deployments.config import ApiSettings
from parse.events import Event, Fallback, Finished, Stage, TextDelta, Usage, Verification
from parse.pair import Pair
from parse.pipeline import Pipeline
from parse.requests import GenerationRequest
from tests.deployments.conftest import MODEL
from tests.deployments.live import LocalBackend, served, without_methods

pytestmark = pytest.mark.slow

with suppress(ImportError):  # without them, the fixture skips the tests
    from selenium.webdriver.common.keys import Keys

    from tests.deployments.browser import ASK, BACK, Playground

FILES = sorted(path for path in Path(playground.__file__).parent.iterdir() if path.suffix != ".py" and path.is_file())
CHAT = "/v1/chat/completions"
TIMES = "\N{MULTIPLICATION SIGN}"
# The draft is wrong from the third line on, and the target corrects it.
KIM = (
    "Kim has the record with 27. In turn: first Uma 73, second Max 52, third Jack 74, fourth Quinn 34, fifth Dan 38, "
    "sixth Ben 80, seventh Sam 26. Who has the record now?"
)
HOSTILE = (
    "<img src=x onerror=\"window.hacked='img'\"><script>window.hacked='script'</script></script></textarea>"
    "<svg onload=alert(1)>&lt;b&gt; \u202eesrever\u202c \u2066isolated\u2069 \u200f javascript:alert(1) ${7*7}\n"
)


@pytest.fixture
def page(browser: Any) -> Iterator["Playground"]:
    yield Playground(browser)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.get("about:blank")  # this ends all requests of the page
    browser.get_log("browser")


# Servers.

Script = Callable[[GenerationRequest], AsyncIterator[Event]]


@dataclass(frozen=True, kw_only=True)
class Scripted(Pipeline):
    """A pipeline with scripted events."""

    script: Script

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        async for event in self.script(request):
            yield event


@contextmanager
def saying(pair: Pair, script: Script, model: str = MODEL, **settings: Any) -> Iterator[str]:
    real = pair.pipeline
    pipeline = Scripted(
        verifier=real.verifier,
        capabilities=real.capabilities,
        tokenizer=real.tokenizer,
        suffix=real.suffix,
        settings=real.settings,
        script=script,
    )
    with served(create_app(LocalBackend(pipeline), ApiSettings(**settings), model)) as address:
        yield address


@contextmanager
def serving_chat(chat: Callable[[], Response]) -> Iterator[str]:
    """Serves the page with a scripted response to chat requests only."""
    app = FastAPI()
    app.include_router(playground.create_router())

    @app.get("/v1/models")
    async def models() -> Any:
        return {"data": [{"id": MODEL, "max_model_len": 100}]}

    @app.get("/ready")
    async def ready() -> Any:
        return {"status": "degraded", "troubles": {"drafter": HOSTILE}}

    @app.post(CHAT)
    async def completions(_: Request) -> Response:
        return chat()

    with served(app, log_level="critical") as address:
        yield address


def text_delta(text: str, origin: Any = "target", tokens: int = 1) -> TextDelta:
    return TextDelta(text, (0,) * tokens, origin)


def done(**usage: Any) -> Finished:
    stages = (Stage("draft", 0.0, 0.1), Stage("judge", 0.1, 0.2))
    return Finished("stop", Usage("full", **usage, stages=stages, ttft_s=0.1, total_s=0.5))


# The files.


def test_the_page_and_its_files_need_no_key_and_load_nothing_else(pair, monkeypatch):
    monkeypatch.setenv("PARSE_API_KEYS", "a-key")
    with served(create_app(LocalBackend(pair.pipeline), ApiSettings(), MODEL)) as address:
        for path in ("/", *(f"/playground/{name}" for name in playground.ASSETS)):
            response = httpx.get(f"{address}{path}")
            assert response.status_code == 200, path
            policy = {
                part.split()[0]: part.split()[1:] for part in response.headers["content-security-policy"].split(";")
            }
            assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == ["'self'"]
            assert policy["frame-ancestors"] == ["'none'"]
            assert response.headers["x-content-type-options"] == "nosniff"
            tag = response.headers["etag"]
            for if_none_match in (tag, f"W/{tag}", f'"another", {tag}'):
                again = httpx.get(f"{address}{path}", headers={"If-None-Match": if_none_match})
                assert (again.status_code, again.content) == (304, b"")
            assert httpx.get(f"{address}{path}", headers={"If-None-Match": '"another"'}).status_code == 200
            assert httpx.head(f"{address}{path}").status_code == 200
            assert httpx.post(f"{address}{path}").status_code == 405
        for path in ("/playground/", "/playground/__init__.py", "/playground/../http.py", "/index.html"):
            assert httpx.get(f"{address}{path}").status_code == 401
        assert httpx.get(f"{address}/v1/models").status_code == 401
        paths = httpx.get(f"{address}/openapi.json").json()["paths"]
        assert paths and not any("playground" in path or path == "/" for path in paths)


def test_every_file_is_served():
    assert {path.name for path in FILES} == {playground.INDEX_FILE, *playground.ASSETS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_parses_markup_or_loads_from_other_servers(path):
    text = path.read_text()
    assert not re.search(r"(inner|outer)HTML|AdjacentHTML|document\.write|\beval\b|new Function|DOMParser", text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|\s(href|src)=\"/", text)
    if path.suffix == ".html":
        assert not re.search(r"\sstyle=|\son\w+=|<style|<script[^>]*>[^<]", text)
        loaded = re.findall(r'"playground/(\w+\.js)"', text)  # the page preloads all modules at once
        assert sorted(loaded) == sorted(name for name in playground.ASSETS if name.endswith(".js"))


# The shown answers.


def send_request(address: str, mode: str, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": KIM}], "temperature": 0, **fields}
    response = httpx.post(f"{address}{CHAT}", json=body | {"parse": {"mode": mode, "trace": True}}, timeout=60)
    return dict(response.raise_for_status().json())


def struck(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns each rejected part, and the text of the answer before it, which ends with a sentence."""
    rejected_parts = []
    answer = "".join(part["text"] for part in report["pieces"])
    for verification in report["verdicts"]:
        tokens, before = 0, ""
        for part in report["pieces"]:
            if tokens < verification["start"] + verification["kept"]:
                before += part["text"]
            tokens += part["tokens"]
        while before and not re.search(r"[.]\s|\n", before[-2:]) and len(before) < len(answer):
            before += answer[len(before)]
        if verification["rejected"]:
            rejected_parts.append((before, verification["rejected"]))
    return rejected_parts


def joined_text(runs: Sequence[tuple[str, str]], *kinds: str) -> str:
    return "".join(text for kind, text in runs if kind in kinds)


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("full", {}),
        ("rounds", {}),
        ("progressive", {}),
        ("exact", {}),
        ("off", {}),
        ("full", {"temperature": 0.9, "seed": 7, "max_tokens": 70}),
    ],
)
def test_the_page_shows_the_same_as_the_api_reports(page, address, mode, fields):
    send_request(address, mode, **fields)  # both models have cached the prompt
    response = send_request(address, mode, **fields)
    report = response["parse"]
    page.open(address)
    for name, value in fields.items():
        page.write(f"#{name.replace('_', '-')}", str(value))
    page.ask(KIM, mode=mode)
    assert page.ended() == ["done"]

    runs = page.runs()
    assert joined_text(runs, "accepted", "target") == response["choices"][0]["message"]["content"]
    for kind, origin in (("accepted", "draft"), ("target", "target")):
        assert joined_text(runs, kind) == "".join(part["text"] for part in report["pieces"] if part["origin"] == origin)
    shown = [
        (joined_text(runs[:place], "accepted", "target"), text)
        for place, (kind, text) in enumerate(runs)
        if kind == "rejected"
    ]
    assert shown == struck(report)
    assert mode not in ("full", "rounds", "progressive") or (shown and joined_text(runs, "accepted"))

    for name in ("mode", "accepted", "written", "rounds", "retries"):
        assert page.report(name) == str(report[name]), name
    if mode != "progressive":  # there, the number depends on when the drafter was stopped
        assert page.report("drafted") == str(report["drafted"])
    assert int(page.report("drafted")) == int(page.report("accepted")) + int(page.report("rejected"))
    assert page.report("boundary") == str(report["boundary"] if report["boundary"] is not None else "none")
    assert float(page.report("total_s")) >= float(page.report("first_s")) > 0

    correct = [p for verification in report["verdicts"] for p in verification["correct"]]
    points = page.run("return [...document.querySelectorAll('.prefix-point')].map(c => c.dataset.p)")
    assert len(points) == len(correct) == len(page.all(".curve tbody tr"))
    expected = [p if p is None else pytest.approx(p, abs=1e-3) for p in correct]
    assert [float(p) if p else None for p in points] == expected
    stages = page.run("return [...document.querySelectorAll('.bar')].map(b => b.classList[1])")
    assert sorted(stages) == sorted(stage["name"] for stage in report["stages"])


def test_prefix_lengths_count_from_the_start_of_their_draft(page, address):
    """Windows of one draft continue each other, and each draft starts at 0."""
    page.open(address)
    report = send_request(address, "progressive")["parse"]
    page.ask(KIM, mode="progressive")
    page.ended()
    cuts = [int(row.split()[1]) for row in page.run(TABLE)]
    kept = sum(verification["kept"] for verification in report["verdicts"])
    assert cuts == sorted(set(cuts)) and len(report["verdicts"]) > 1
    assert [int(row.split()[1]) for row in page.run(TABLE) if row.endswith("passes")][-1] == kept
    report = send_request(address, "rounds")["parse"]
    page.ask(KIM, mode="rounds")
    page.ended()
    rows = [row.split() for row in page.run(TABLE)]
    assert [(int(row[0]), int(row[1])) for row in rows] == [
        (number + 1, prefix_length)
        for number, verification in enumerate(report["verdicts"])
        for prefix_length in verification["cuts"]
    ]


TABLE = """return [...document.querySelectorAll('.curve tbody tr')]
    .map(row => [...row.cells].map(cell => cell.textContent).join(' '))"""


def test_thresholds_are_sent_and_drawn(page, address):
    page.open(address)
    page.write("#full", "0.97")
    page.write("#prefix", "0.5")
    page.ask(KIM)
    page.ended()
    assert page.run("return [...document.querySelectorAll('.threshold-name')].map(t => t.textContent)") == [
        "full 0.97",
        "prefix 0.5",
    ]
    assert "Thresholds: full 0.97, prefix 0.5" in str(page.one(".curve svg").get_attribute("aria-label"))


def test_without_thresholds_those_of_the_server_are_drawn(page, address):
    (card,) = httpx.get(f"{address}/v1/models").json()["data"]
    page.open(address)
    page.ask(KIM)
    page.ended()
    assert page.run("return [...document.querySelectorAll('.threshold-name')].map(t => t.textContent)") == [
        f"full {card['parse']['full']}",
        f"prefix {card['parse']['prefix']}",
    ]
    assert page.one("#full").get_attribute("placeholder") == str(card["parse"]["full"])


def test_a_method_can_be_chosen_and_the_report_shows_the_tokens_per_pass(page, address):
    page.open(address)
    page.until(lambda: page.one("#methods").is_displayed(), "the methods are known")
    assert page.run("return [...document.querySelectorAll('#method option')].map(o => o.value)") == [
        "parallel",
        "ngram",
        "none",
    ]
    assert page.run("return document.getElementById('method').value") == "parallel"  # the default of the server
    page.ask(KIM, mode="off", against="off", methods=("parallel", "none"))
    assert page.ended() == ["done", "done"]
    assert page.runs(0) == page.runs(1)
    written, passes = int(page.report("written")), int(page.report("passes"))
    assert page.report("tokens_per_pass") == f"{written / passes:.2f}" and written > 2 * passes
    taken, proposed = map(int, page.report("proposed").split(" of "))
    assert page.report("speculation") == "parallel" and written - passes <= taken <= proposed
    assert not page.all(".pane:last-child [data-report=speculation]")
    assert [title.text for title in page.all("h3")] == ["off", "off, none"]
    rows = page.run("return [...document.querySelectorAll('#session-rows tr')].map(row => row.dataset.mode)")
    assert rows == ["off", "off, none"]
    assert page.console() == []


def test_without_methods_there_is_no_choice_of_a_method(page, pair):
    with served(create_app(LocalBackend(without_methods(pair.pipeline)), ApiSettings(), MODEL)) as address:
        page.open(address)
        page.until(lambda: page.one("#model").text == MODEL, "the model is known")
        assert not page.one("#methods").is_displayed()
        page.ask(KIM, mode="full")
        assert page.ended() == ["done"]


def test_the_user_s_draft_replaces_that_of_the_drafter(page, address):
    page.open(address)
    page.write("#prediction", "First, Uma scores 73")
    page.ask(KIM, mode="exact")
    page.ended()
    assert page.runs()[0] == ("accepted", "First, Uma scores 73")
    assert "exact, own draft" in page.one("#session-rows").text


def test_two_modes_are_shown_side_by_side_with_their_speed_up(page, address):
    page.open(address)
    page.ask(KIM, mode="full", against="off")
    assert page.ended() == ["done", "done"]
    left, right = page.all(".pane")
    assert left.rect["y"] == right.rect["y"] and left.rect["x"] < right.rect["x"]
    assert joined_text(page.runs(1), "target") == send_request(address, "off")["choices"][0]["message"]["content"]
    seconds = [float(page.report("total_s", pane)) for pane in (0, 1)]
    ratio = float(page.one("#comparison b").text.removesuffix(TIMES))
    assert ratio == pytest.approx(max(seconds) / min(seconds), rel=0.05)
    rate = {
        row.get_attribute("data-mode"): row.find_element("css selector", "td:nth-child(4)").text
        for row in page.all("#session-rows tr")
    }
    shown = page.one("#session-rows tr[data-mode=full] [data-figure=speedup]").text
    assert float(shown.removesuffix(TIMES)) == pytest.approx(int(rate["full"]) / int(rate["off"]), rel=0.05)
    assert not page.one("#no-baseline").is_displayed()
    assert page.run("return performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")
    assert page.run("return performance.getEntriesByType('resource').length") > len(playground.ASSETS)
    assert page.console() == []


@pytest.mark.parametrize(
    ("report", "off", "sentence"),
    [
        (dict(drafted=100, accepted=20), {}, "Only 20% of the draft was accepted"),
        (
            dict(drafted=100, accepted=90),
            dict(speculation=dict(method="parallel", tokens_per_pass=3.4)),
            "With the method parallel, the target alone generates 3.4 tokens per forward pass",
        ),
        (dict(drafted=100, accepted=90), {}, "Drafting and verifying took longer"),
        (dict(mode="off", drafted=0, accepted=0, fallback="no drafter"), {}, "Drafting saved nothing: no drafter."),
    ],
)
def test_a_comparison_says_why_the_target_alone_is_faster(page, address, report, off, sentence):
    page.open(address)
    script = """
        const [a, b, tell] = arguments;
        import('./playground/comparison.js').then(({comparison}) => tell(comparison(a, b)));"""
    usual = dict(total_s=2.0, written=10)
    slow = dict(name="full", mode="full", text="a", report=usual | dict(mode="full") | report)
    fast = dict(name="off", mode="off", text="a", report=usual | dict(mode="off", accepted=0, total_s=1.0) | off)
    for panes in ((slow, fast), (fast, slow)):
        result = page.browser.execute_async_script(script, *panes)
        assert result["ratio"] == f"2.00{TIMES}"
        assert any(text.startswith(sentence) for text in result["sentences"])
    gain = page.browser.execute_async_script(script, fast | dict(name="full", mode="full"), slow)
    assert not any(text.startswith(sentence) for text in gain["sentences"])


def test_the_whole_question_is_visible(page, address):
    page.open(address)
    for example in page.all(".example"):
        example.click()
        assert page.run("const box = document.getElementById('question'); return box.scrollHeight <= box.clientHeight")


def test_both_rows_of_a_comparison_look_alike(page, address):
    page.open(address)
    page.until(lambda: page.one("#methods").is_displayed(), "the methods are shown")
    modes, methods = (page.one(selector) for selector in (".modes .pair", "#methods .pair"))
    assert modes.text.count("against") == methods.text.count("against") == 1
    for first, second in zip(modes.find_elements("xpath", "./*"), methods.find_elements("xpath", "./*"), strict=True):
        assert (first.tag_name, first.rect["x"], first.rect["width"]) == (
            second.tag_name,
            second.rect["x"],
            second.rect["width"],
        )


def test_there_is_no_speed_up_before_mode_off_was_measured(page, address):
    page.open(address)
    page.ask(KIM)
    page.ended()
    assert "unknown" in page.one("#session-rows").text and page.one("#no-baseline").is_displayed()
    page.one("#measure-off").click()
    page.until(lambda: len(page.all(".pane")) == 2, "the target is asked")
    assert page.ended() == ["done", "done"]
    assert not page.one("#no-baseline").is_displayed()
    assert page.run("return document.activeElement.id") == "answers"  # the focus is not lost when the button disappears
    assert page.one("#session-rows tr[data-mode=full] [data-figure=speedup]").text.endswith(TIMES)


def test_the_names_of_the_examples_match_their_answers(page, address):
    page.open(address)
    examples = page.run("return [...document.querySelectorAll('.example')].map(b => [b.textContent, b.title])")
    kept = {"middle": (0.3, 0.7), "near": (0.6, 0.95), "uncertain": (0.6, 0.99), "early": (0.1, 0.5), "wrong": (0, 0)}
    assert len(examples) == 6
    for name, prompt in examples:
        report = send_request(address, "full", messages=[{"role": "user", "content": prompt}])["parse"]
        low, high = next((share for word, share in kept.items() if word in name), (1, 1))
        assert low <= report["accepted"] / report["drafted"] <= high, name
        assert ("uncertain" in name) == any(p and 0.1 < p < 0.9 for p in report["verdicts"][0]["correct"]), name


# Streams.


@dataclass
class Slow:
    """Sends a part of the answer, and the rest when `may_go_on` is set."""

    may_go_on: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, _: GenerationRequest) -> AsyncIterator[Event]:
        try:
            yield text_delta("A beginning ", "draft", 2)
            yield Verification(0, (0,) * 4, (2, 4), (0.99, 0.02), 2, "that was wrong")
            while not self.may_go_on.is_set():
                await asyncio.sleep(0.005)
            for word in range(200):
                yield text_delta(f"{word} ")
            yield done(draft_tokens=4, accepted_tokens=2, target_tokens=200)
        finally:
            self.left.set()


def test_text_is_shown_as_it_arrives_and_announced_once(page, pair):
    slow = Slow()
    with saying(pair, slow) as address:
        page.open(address)
        page.run(
            """window.announcements = [];
            new MutationObserver(() => announcements.push(document.getElementById('live').textContent))
                .observe(document.getElementById('live'), {childList: true, characterData: true, subtree: true});"""
        )
        page.ask("Well?")
        page.until(lambda: len(page.runs()) == 2, "the first words are shown before the last are written")
        assert page.runs() == [("accepted", "A beginning "), ("rejected", "that was wrong")]
        pane = page.one(".pane")
        assert (pane.get_attribute("data-state"), pane.get_attribute("aria-busy")) == ("generating", "true")
        assert len(page.all(".prefix-point")) == 2  # P(correct) is shown too
        slow.may_go_on.set()
        assert page.ended() == ["done"] and pane.get_attribute("aria-busy") == "false"
        assert page.runs()[1] == ("target", "".join(f"{word} " for word in range(200)))
        announcements = page.run("return announcements")
        assert len(announcements) == 2 and "2 of 4 draft tokens accepted, 200 target tokens" in announcements[-1]


@pytest.mark.parametrize("trigger", ["Escape", "button"])
def test_a_stopped_answer_keeps_its_text(page, pair, trigger):
    slow = Slow()
    with saying(pair, slow) as address:
        page.open(address)
        page.ask("Well?", against="off")
        page.until(lambda: page.runs(), "the first words")
        if trigger == "Escape":
            page.press(Keys.ESCAPE)
        else:
            page.one("#stop").click()
        assert page.ended() == ["stopped", "stopped"]
        assert slow.left.wait(20), "the server goes on for nobody"
        assert joined_text(page.runs(), "accepted") == "A beginning "
        assert not page.one("#stop").is_enabled() and page.run("return document.activeElement.id") != "stop"
        assert "Stopped" in str(page.one("#live").get_attribute("textContent"))
        assert page.console() == []
        slow.may_go_on.set()
        page.ask("Again?")  # the page can send another request
        assert page.ended() == ["done"]


def test_events_are_read_with_any_chunk_boundaries(page, address):
    page.open(address)
    stream = 'data: {"a":"ü𝄞"}\r\n\r\n: a comment\ndata: one\ndata:two\n\nevent: x\ndata: [DONE]\n\ndata: never ended'
    script = """
        const [text, size, tell] = arguments;
        import('./playground/api.js').then(async ({events}) => {
            const bytes = new TextEncoder().encode(text), found = [];
            const parts = new ReadableStream({start(to) {
                for (let at = 0; at < bytes.length; at += size) to.enqueue(bytes.slice(at, at + size));
                to.close();
            }});
            for await (const data of events(parts)) found.push(data);
            tell(found);
        });"""
    for size in (1, 2, 3, 7, 1000):
        assert page.browser.execute_async_script(script, stream, size) == ['{"a":"ü𝄞"}', "one\ntwo", "[DONE]"]


def test_rejected_text_has_its_place_even_if_it_arrives_first(page, address):
    page.open(address)
    script = """
        const [pieces, verdicts, tell] = arguments;
        import('./playground/transcript.js')
            .then(({runs}) => tell(runs(pieces, verdicts).map(run => [run.kind, run.text])));"""
    pieces = [
        dict(text="a b. ", origin="draft", tokens=2),
        dict(text="c", origin="target", tokens=1),
        dict(text="", origin="target", tokens=1),
        dict(text=" d", origin="draft", tokens=1),
        dict(text="!", origin="draft", tokens=0),
    ]
    verdicts = [dict(start=0, kept=2, rejected="x"), dict(start=4, kept=1, rejected="y")]
    expected = [
        ["accepted", "a b. "],
        ["rejected", "x"],
        ["target", "c"],
        ["accepted", " d!"],
        ["rejected", "y"],
    ]
    assert page.browser.execute_async_script(script, pieces, verdicts) == expected
    assert page.browser.execute_async_script(script, pieces, verdicts[::-1]) == expected
    assert page.browser.execute_async_script(script, pieces[:1], verdicts[:1]) == expected[:2]
    assert page.browser.execute_async_script(script, [], verdicts) == []  # they are shown when their text arrives
    # Rejected text never interrupts a sentence: it comes after the one that replaces it.
    pieces = [
        dict(text="He has 3.5 of", origin="draft", tokens=4),
        dict(text=" them. Then", origin="target", tokens=3),
        dict(text=" 2.\nNow", origin="draft", tokens=3),
        dict(text=" 5.", origin="target", tokens=2),
    ]
    verdicts = [
        dict(start=0, kept=4, rejected="x"),
        dict(start=7, kept=0, rejected="y"),
        dict(start=7, kept=3, rejected="z"),
    ]
    assert page.browser.execute_async_script(script, pieces, verdicts) == [
        ["accepted", "He has 3.5 of"],
        ["target", " them. "],
        ["rejected", "x"],
        ["target", "Then"],
        ["accepted", " 2.\n"],
        ["rejected", "y"],
        ["accepted", "Now"],
        ["target", " 5."],
        ["rejected", "z"],
    ]


# Errors.


def failing(error: Exception, *before: Event) -> Script:
    async def script(_: GenerationRequest) -> AsyncIterator[Event]:
        for event in before:
            yield event
        raise error

    return script


def problem(page: "Playground") -> str:
    assert page.ended() == ["failed"]
    box = page.one(".problem")
    assert box.get_attribute("role") == "alert"
    return str(box.text)


@pytest.mark.parametrize(
    ("script", "message", "shown"),
    [
        (failing(Overloaded(7)), "The server is busy.*Ask again in 7 seconds", ""),
        (failing(RuntimeError("secret")), "The server failed.*Ask again", ""),
        (
            failing(RuntimeError("secret"), text_delta("Half of")),
            "The answer is incomplete.*text that has arrived stays",
            "Half of",
        ),
    ],
    ids=["503", "500", "an error in the stream"],
)
def test_an_error_says_what_to_do_and_keeps_the_text(page, pair, script, message, shown):
    with saying(pair, script) as address:
        page.open(address)
        page.ask("Well?")
        text = problem(page)
        assert re.search(message, text, re.DOTALL) and "secret" not in text
        assert re.search(r"request [0-9a-f-]{8,} in the server", text)
        assert joined_text(page.runs(), "target") == shown
        assert not page.one("#stop").is_enabled()


def chunk(text: str) -> str:
    delta = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    shown = {"piece": {"text": text, "origin": "target", "tokens": 1}}
    return f"data: {json.dumps({'choices': [delta], 'parse': shown})}\n\n"


def breaking(now: threading.Event | None = None) -> Response:
    """Returns a stream that ends too early, or whose connection breaks."""

    async def parts() -> AsyncIterator[str]:
        yield chunk("Half of")
        if now is not None:
            while not now.is_set():
                await asyncio.sleep(0.005)
            raise ConnectionError("the server dies")

    return StreamingResponse(parts(), media_type="text/event-stream")


def refusing(status: int, message: str, code: str | None = None, **more: Any) -> Response:
    return JSONResponse({"error": {"message": message, "code": code, "param": None, "type": "x"} | more}, status)


@pytest.mark.parametrize(
    ("chat", "message", "shown"),
    [
        (breaking, "stream was cut off.*text that has arrived stays", "Half of"),
        (lambda: Response("Internal Server Error", 500), "The server failed", ""),
        (lambda: Response("Bad gateway", 502, media_type="text/html"), "The server failed", ""),
        (lambda: refusing(401, "no", "no_keys"), "serves only its own machine.*through a tunnel", ""),
        (lambda: refusing(404, "no", "model_not_found"), "rejected the request", ""),
        (lambda: refusing(413, "no", "too_long"), "too long.*Shorten", ""),
        (lambda: refusing(504, "no", "timeout"), "too long", ""),
        (lambda: refusing(400, HOSTILE, param="a']\"b"), "Change a'", ""),
        (lambda: Response("data: no json\n\n", media_type="text/event-stream"), "cut off", ""),
        (lambda: Response("data: [DONE]\n\n", media_type="text/event-stream"), "cut off", ""),
    ],
    ids="cut 500 502 no-keys 404 413 504 400 no-json empty".split(),
)
def test_the_page_handles_faulty_responses(page, chat, message, shown):
    with serving_chat(chat) as address:
        page.open(address)
        page.ask("Well?")
        assert re.search(message, problem(page), re.DOTALL)
        assert joined_text(page.runs(), "target") == shown
        assert page.run("return window.hacked") is None


def test_a_lost_connection_is_reported_and_the_text_stays(page):
    now = threading.Event()
    with serving_chat(lambda: breaking(now)) as address:
        page.open(address)
        page.ask("Well?")
        page.until(page.runs, "the first words")
        now.set()
        assert re.search("connection was lost.*text that has arrived stays", problem(page), re.DOTALL)
        assert page.runs() == [("target", "Half of")]


def test_an_unreachable_server_is_reported(page, pair):
    with saying(pair, Slow()) as address:
        page.open(address)
    page.ask("Well?")
    assert "The connection was lost" in problem(page)


def test_a_rejected_field_is_marked(page, address):
    page.open(address)
    page.write("#prefix", "0.1")
    page.ask(KIM)
    assert "Change parse.prefix" in problem(page) and "at least 0.5" in problem(page)
    assert page.run("return [...document.querySelectorAll('[aria-invalid]')].map(f => f.id)") == ["prefix"]
    page.write("#prefix", "0.9")
    page.ask(KIM)
    assert page.ended() == ["done"] and not page.all("[aria-invalid]")


def test_a_mode_that_the_operator_does_not_allow_cannot_be_chosen(page, pair):
    with served(create_app(LocalBackend(pair.pipeline), ApiSettings(modes=("full", "off")), MODEL)) as address:
        page.open(address)
        page.until(lambda: page.one("#model").text == MODEL, "the model is known")
        allowed = "return [...document.querySelectorAll('#mode option:not(:disabled)')].map(o => o.value)"
        assert page.run(allowed) == ["full", "off"]
        # If a user chooses it anyway, the API names the faulty field.
        page.run("document.querySelectorAll('option').forEach(o => { o.disabled = false })")
        page.ask(KIM, mode="rounds", against="off")
        assert page.ended() == ["failed", "done"]
        assert "parse.mode" in page.one(".problem").text and "full, off" in page.one(".problem").text
        assert page.one("#mode").get_attribute("aria-invalid") == "true"
        assert "not both completed" in page.one("#comparison").text


def test_the_page_requests_and_sends_a_key_and_keeps_it_in_its_tab(page, pair, monkeypatch):
    monkeypatch.setenv("PARSE_API_KEYS", "open-sesame")
    with served(create_app(LocalBackend(pair.pipeline), ApiSettings(), MODEL)) as address:
        page.open(address)
        assert page.one("#model").text == "A key is required" and page.one("#key").is_displayed()
        page.ask(KIM)
        assert "Enter one of the server" in problem(page)
        page.write("#key", "wrong")
        page.ask()
        assert "A key is required" in problem(page)
        page.write("#key", "open-sesame")
        page.ask()
        assert page.ended() == ["done"]
        page.until(lambda: page.one("#model").text == MODEL, "the model is known")
        elsewhere = page.run("return [JSON.stringify(localStorage), location.href, document.cookie].join()")
        assert "sesame" not in elsewhere
        assert page.one("#key").get_attribute("type") == "password"
        page.open(address)
        assert page.run("return document.getElementById('key').value") == "open-sesame"
        assert page.one("#model").text == MODEL


# Security.


def test_the_output_of_a_model_never_becomes_markup(page, pair):
    async def script(_: GenerationRequest) -> AsyncIterator[Event]:
        yield text_delta(HOSTILE, "draft", 3)
        yield Verification(0, (0,) * 6, (3, 6), (0.99, 0.01), 3, HOSTILE)
        yield text_delta(HOSTILE)
        yield done(draft_tokens=6, accepted_tokens=3, target_tokens=1, fallback=Fallback("failed", HOSTILE))

    with saying(pair, script, model=HOSTILE.strip()) as address:
        page.open(address)
        before = page.run("return document.querySelectorAll('img, script, svg *, iframe').length")
        page.ask(HOSTILE, mode="full")
        assert page.ended() == ["done"]
        assert page.runs() == [("accepted", HOSTILE), ("rejected", HOSTILE), ("target", HOSTILE)]
        assert page.report("fallback") == HOSTILE
        assert page.run("return document.getElementById('model').textContent") == HOSTILE.strip()
        assert page.run("return window.hacked") is None
        assert page.run("return document.querySelectorAll('img, iframe, script:not([src])').length") == 0
        assert before == 1  # the script of the page itself
        isolated = "return [...document.querySelectorAll('.pane .run')].map(r => getComputedStyle(r).unicodeBidi)"
        assert page.run(isolated) == ["isolate"] * 3
        assert page.console() == []


def test_the_browser_also_blocks_markup_and_foreign_scripts(page, address):
    page.open(address)
    trying = """try { document.body.innerHTML = '<b>'; return 'taken' } catch (error) { return error.name }"""
    assert page.run(trying) == "TypeError"
    page.run("""const script = document.createElement('script');
        try { script.src = 'data:,window.hacked=1'; document.head.append(script) } catch {}""")
    assert page.run("return window.hacked") is None


# Accessibility.


def test_all_functions_can_be_used_from_the_keyboard(page, pair):
    slow = Slow()
    with saying(pair, slow) as address:
        page.open(address)
        page.run("document.activeElement.blur()")
        reached: list[str] = []
        for _ in range(40):
            page.press(Keys.TAB)
            name = page.run("const a = document.activeElement; return a.id || a.className || a.textContent")
            if name in reached[:1]:
                break
            assert page.run(
                """const s = getComputedStyle(document.activeElement);
                return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 1"""
            ), f"{name} does not show that it has the focus"
            reached.append(name)
            if name == "ask":
                break
        tab_order = "skip theme question example mode compare temperature seed max-tokens ask".split()
        assert [name for name in tab_order if name in reached] == tab_order
        page.run("document.getElementById('question').focus()")
        page.press(Keys.CONTROL + "a" + Keys.NULL, "Anybody there?", ASK)
        page.until(lambda: page.runs(), "it is asked")
        page.press(Keys.ESCAPE)
        assert page.ended() == ["stopped"]
        page.run("document.getElementById('mode').focus()")
        page.press("off")
        slow.may_go_on.set()
        page.press(ASK)
        page.until(lambda: page.ended() == ["done"], "asked again from a list of choices")
        assert page.one("h3").text == "off"
        page.run("document.getElementById('ask').focus()")
        page.press(BACK + Keys.NULL, Keys.TAB)
        assert page.run("return document.activeElement.matches(':focus-visible')")


def test_every_control_has_a_name(page, address):
    page.open(address)
    page.ask(KIM)
    page.ended()
    nameless = page.run(
        """return [...document.querySelectorAll('button, input, select, textarea, summary, [role=region], [role=img]')]
            .filter(c => !(c.labels?.length || c.textContent.trim() || c.getAttribute('aria-label')))
            .map(c => c.outerHTML)"""
    )
    assert nameless == []
    assert page.run(
        """const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
        const named = [...document.querySelectorAll('[for], [aria-labelledby], [aria-describedby]')].flatMap(e =>
            ['for', 'aria-labelledby', 'aria-describedby'].map(a => e.getAttribute(a)).filter(Boolean));
        return new Set(ids).size === ids.length && named.every(id => ids.includes(id))"""
    )
    levels = page.run("return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))


CONTRASTS = """
    // The backgrounds of all that it stands on, in the order they are painted.
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const luminance = (layers) => {
        for (const color of layers) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1) }
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const under = (node) => node ? [...under(node.parentElement), getComputedStyle(node).backgroundColor] : [];
    const shown = [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length);
    return shown.map(e => {
        const ground = under(e), style = getComputedStyle(e);
        const ink = e instanceof SVGElement ? style.fill : style.color;
        const [a, b] = [luminance(ground), luminance([...ground, ink])].sort((x, y) => y - x);
        return [`${e.tagName} ${e.getAttribute('class') ?? ''} ${e.id}`, (a + 0.05) / (b + 0.05)];
    })"""
WORDS = (
    ".run, p, label, legend, summary, h1, h2, h3, h4, dt, dd, small, th, td, .thin, .state, button:not(:disabled), "
    "kbd, svg text, input, select:not(:disabled), textarea, .faint, .problem *"
)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_themes(page, address, theme):
    page.open(address)
    while page.one("#theme-name").text != theme:
        page.one("#theme").click()
    page.write("#full", "0.97")
    page.ask(KIM, mode="full")
    page.ended()
    page.write("#full", "0.1")
    pale = dict(page.run(CONTRASTS, WORDS))
    page.ask(KIM, mode="full")
    page.ended()
    pale |= dict(page.run(CONTRASTS, WORDS))
    assert len(pale) > 40
    assert {name: ratio for name, ratio in pale.items() if ratio < 4.5} == {}
    page.open(address)
    assert page.one("#theme-name").text == theme  # the browser has stored the choice
    page.run("localStorage.clear()")


def test_the_theme_follows_the_system_until_the_user_chooses_one(page, address):
    page.open(address)

    def dark(system: str) -> bool:
        media = {"features": [{"name": "prefers-color-scheme", "value": system}]}
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        color = page.run("return getComputedStyle(document.documentElement).backgroundColor")
        return int(re.findall(r"\d+", color)[0]) < 128

    for system, name, shown in [("dark", "system", True), ("light", "system", False)]:
        assert (dark(system), page.one("#theme-name").text) == (shown, name)
    page.one("#theme").click()
    assert page.one("#theme-name").text == "light" and not dark("dark")
    page.one("#theme").click()
    assert page.one("#theme-name").text == "dark" and dark("light")
    page.one("#theme").click()
    assert page.one("#theme-name").text == "system"


def test_animations_are_off_if_the_user_prefers_reduced_motion(page, pair):
    slow = Slow()
    with saying(pair, slow) as address:
        page.open(address)
        page.ask("Well?")
        page.until(lambda: page.runs(), "the first words")
        moves = "return getComputedStyle(document.querySelector('.state'), '::before').animationName"
        for value, name in (("no-preference", "breathe"), ("reduce", "none")):
            media = {"features": [{"name": "prefers-reduced-motion", "value": value}]}
            page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            assert page.run(moves) == name
        slow.may_go_on.set()
        page.ended()


@pytest.mark.parametrize("width", [360, 700, 1000, 2560])
def test_the_page_fits_small_and_large_screens(page, pair, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}

    async def script(_: GenerationRequest) -> AsyncIterator[Event]:
        yield text_delta("long" * 200 + "\n", "draft", 3)
        yield Verification(0, (0,) * 40, tuple(range(1, 41)), (0.99,) * 3 + (0.01,) * 37, 3, "wrong " * 100)
        yield done(draft_tokens=40, accepted_tokens=3)

    with saying(pair, script) as address:
        page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        page.open(address)
        page.ask("Well?", against="rounds")
        assert page.ended() == ["done", "done"]
        page.until(lambda: len(page.all(".curve svg")) == 2, "the charts are drawn")
        inner_width, scroll_width = page.run("return [innerWidth, document.documentElement.scrollWidth]")
        assert scroll_width <= inner_width == width
        assert page.run("return document.querySelector('.pane').getBoundingClientRect().top < innerHeight")
        beyond = """return [...document.querySelectorAll('.plot svg')].map(s => s.getBoundingClientRect())
            .filter(r => r.right > innerWidth || r.left < 0).length"""
        assert page.run(beyond) == 0


def test_the_page_works_under_any_route_prefix(page, pair):
    inner = create_app(LocalBackend(pair.pipeline), ApiSettings(), MODEL)
    outer = FastAPI()
    outer.mount("/some/prefix", inner)
    with served(outer) as address:
        page.open(f"{address}/some/prefix")
        page.ask(KIM)
        assert page.ended() == ["done"]
        places = page.run("return performance.getEntriesByType('resource').map(e => new URL(e.name).pathname)")
        assert places and all(place.startswith("/some/prefix/") for place in places)
        assert page.console() == []


def test_a_prefix_without_its_last_slash_redirects(pair, monkeypatch):
    """The request is like those of Ray Serve, whose path includes the prefix."""
    monkeypatch.setenv("PARSE_API_KEYS", "a-key")
    app = create_app(LocalBackend(pair.pipeline), ApiSettings(), MODEL)

    async def get(path: str) -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path="/parse")
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path)

    led = asyncio.run(get("/parse"))
    assert (led.status_code, led.headers["location"]) == (307, "http://here/parse/")
    assert asyncio.run(get("/parse/")).status_code == 200
    assert asyncio.run(get("/parse/v1/models")).status_code == 401


def test_the_page_shows_the_readiness_of_the_server(page, pair):
    backend = LocalBackend(pair.pipeline)
    for wrong, shown in [
        ({}, "ready"),
        ({"drafter": "it is away"}, "degraded, no drafter"),
        ({"verifier": "it is away"}, "unavailable, no verifier"),
    ]:
        with served(create_app(replace(backend, wrong=wrong), ApiSettings(), MODEL)) as address:
            page.open(address)
            page.until(lambda shown=shown: page.one("#ready-text").text == shown, shown)
            assert page.one("#ready").get_attribute("title") == "\n".join(f"{k}: {v}" for k, v in wrong.items())
