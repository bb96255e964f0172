"""A page of another origin uses the API in a real browser."""

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from deployments.api.routes import create_app
from deployments.config import ApiSettings
from tests.deployments.conftest import MODEL
from tests.deployments.live import LocalBackend, served

pytestmark = pytest.mark.slow

# What a web page with a chat does. The result is {status, requestId, chunks} or {error}.
SCRIPT = """
    const [address, model, tell] = arguments;
    const chat = async () => {
        const response = await fetch(`${address}/v1/chat/completions`, {
            method: "POST",
            headers: { "Content-Type": "application/json", "Authorization": "Bearer a-key" },
            body: JSON.stringify({
                model, stream: true, max_tokens: 8, messages: [{ role: "user", content: "Hello." }],
            }),
        });
        const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
        let text = "";
        for (;;) {
            const { value, done } = await reader.read();
            if (done) break;
            text += value;
        }
        const chunks = text.split("\\n\\n").filter((event) => event.startsWith("data: {")).length;
        const requestId = response.headers.get("x-request-id");
        return { status: response.status, requestId, chunks, end: text.slice(-14) };
    };
    chat().then(tell, (error) => tell({ error: error.name }));
"""


@pytest.fixture
def page_address() -> Any:
    app = FastAPI()

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return "<!doctype html><title>A page</title>"

    with served(app) as address:
        yield address


def test_a_page_of_an_allowed_origin_streams_an_answer(browser, pair, page_address):
    settings = ApiSettings(cors_origins=(page_address,))
    with served(create_app(LocalBackend(pair.pipeline), settings, MODEL)) as address:
        browser.get(page_address)
        result = browser.execute_async_script(SCRIPT, address, MODEL)
    assert result["status"] == 200 and result["chunks"] > 1 and result["end"] == "data: [DONE]\n\n"
    assert result["requestId"]


@pytest.mark.parametrize("origins", [(), ("https://example.org",)])
def test_a_page_of_any_other_origin_does_not(browser, pair, page_address, origins):
    settings = ApiSettings(cors_origins=origins)
    with served(create_app(LocalBackend(pair.pipeline), settings, MODEL)) as address:
        browser.get(page_address)
        assert browser.execute_async_script(SCRIPT, address, MODEL) == {"error": "TypeError"}
