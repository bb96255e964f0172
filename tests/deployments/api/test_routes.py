"""Tests the server on a real port, also with faulty clients."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import httpx
import openai
import pytest
from openai import OpenAI
from starlette.requests import ClientDisconnect

from deployments.api.request_models import ChatCompletionRequest, CompletionRequest
from deployments.api.request_parsing import ParsedRequest, RequestParser
from deployments.api.routes import create_app
from deployments.config import ApiSettings
from parse.controller import DraftingController
from parse.engines.protocol import Verifier
from parse.pair import Pair
from parse.requests import GenerateRequest
from parse.types import TokenDelta
from tests.deployments.conftest import MODEL
from tests.deployments.live import PATIENCE_S, LocalBackend, Writer, connected, served, until, without_methods
from training.measure import draw_problems

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: list[Any] = [{"role": "user", "content": "Hello."}]
BODY: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 2, "parse": {"mode": "off"}}
JSON = {"content-type": "application/json"}
CLIENTS = {"openai", "httpx", "httpx2", "httpcore", "httpcore2"}  # their logs contain the sent headers


@contextmanager
def serving(pair: Pair, writer: Any = None, **settings: Any) -> Iterator[str]:
    pipeline = replace(pair.pipeline, verifier=writer, drafter=None) if writer else pair.pipeline
    with served(create_app(LocalBackend(pipeline), ApiSettings(**settings), MODEL)) as address:
        yield address


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Returns the error after checking that it has the format of the OpenAI API."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"]
    error: dict[str, Any] = body["error"]
    return error


def post(address: str, body: Any = None, path: str = CHAT, **headers: str) -> httpx.Response:
    return httpx.post(f"{address}{path}", json=BODY if body is None else body, headers=headers, timeout=PATIENCE_S)


@pytest.fixture(autouse=True)
def it_serves_on(raw):
    """Checks that the server still answers after each test."""
    yield
    response = raw.post(CHAT, json=BODY)
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 2


# Bodies.


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_value"),
        (b"null", "invalid_value"),
        (b"[]", "invalid_value"),
        (b'"text"', "invalid_value"),
        (b"5", "invalid_value"),
        (b"{", "invalid_json"),
        (b"{'model': 1}", "invalid_json"),
        (b'{"model": "x",}', "invalid_json"),
        (b'{"model": "x"} and more', "invalid_json"),
        (b"\x00", "invalid_json"),
        (b'{"model": "\xff\xfe"}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"model": "tab\there"}', "invalid_json"),
        (b"PK\x03\x04" + bytes(range(256)), "invalid_json"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_invalid_requests_are_rejected(raw, path, body, code):
    error = error_of(raw.post(path, content=body, headers=JSON), 400)
    assert (error["param"], error["code"]) == ("body", code)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", ""])
def test_a_body_with_another_content_type_is_rejected(raw, kind):
    error = error_of(raw.post(CHAT, content=json.dumps(BODY), headers={"content-type": kind}), 400)
    assert error["param"] == "body" and "application/json" in error["message"]


def test_an_encoded_half_of_a_surrogate_pair_is_rejected(raw):
    error = error_of(raw.post(CHAT, content=b'{"model": "\xed\xa0\x80", "messages": []}', headers=JSON), 400)
    assert error["code"] == "invalid_value"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_body_may_have_any_encoding_that_json_allows(raw, encoding):
    assert raw.post(CHAT, content=json.dumps(BODY).encode(encoding), headers=JSON).status_code == 200


def test_the_last_of_two_fields_with_the_same_name_counts(raw):
    body = json.dumps(BODY)[:-1] + ', "max_tokens": 1}'
    assert raw.post(CHAT, content=body, headers=JSON).json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "value", ['{"nonsense": [1]}', "[[null]]", "-1e30", "1" * 30, "NaN", "-Infinity", "1e999", '"\\ud800"']
)
def test_a_wrong_value_is_rejected_with_the_field_name(raw, value):
    for path, usual, fields in (
        (CHAT, BODY, ChatCompletionRequest.model_fields),
        (COMPLETIONS, {"model": MODEL, "prompt": "Hello"}, CompletionRequest.model_fields),
    ):
        for name in fields:
            body = f"{json.dumps(usual)[:-1]}, {json.dumps(name)}: {value}}}"
            error = error_of(raw.post(path, content=body, headers=JSON), 400)
            assert error["param"].startswith(name) and error["message"].startswith(name)


def test_empty_lists_of_tools_and_stop_strings_are_accepted(raw):
    assert raw.post(CHAT, json=BODY | {"tools": [], "stop": []}).status_code == 200


@pytest.mark.parametrize("text", ["a\x00b", "\x00", "\x01\x1b[31m\x7f", "\r\n", "\u2028\ufeff", "\U0001f600" * 20, ""])
def test_any_text_is_served(raw, text):
    body = BODY | {"messages": [{"role": "user", "content": text}], "stop": ["\x00", "\u2028"], "user": text}
    response = raw.post(CHAT, json=body | {"prediction": {"type": "content", "content": text}})
    assert response.status_code == 200
    assert raw.post(COMPLETIONS, json={"model": MODEL, "prompt": f"x{text}", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("name", ["", "a\x00b", "\ud800", "x" * 5000, "model ", "a.b[0]", "__class__"])
def test_an_unknown_field_with_any_name_is_rejected(raw, name):
    error = error_of(raw.post(CHAT, content=json.dumps(BODY | {name: 1}), headers=JSON), 400)
    assert error["code"] == "unsupported_field" or not name
    assert len(error["message"]) < 200


def test_a_stream_is_rejected_with_the_same_error(raw):
    assert error_of(raw.post(CHAT, json=BODY | {"stream": True, "n": 0}), 400)["param"] == "n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"logit_bias": {"510": 1}}, "logit_bias"),
        (CHAT, {"n": 17}, "n"),
        (CHAT, {"n": 2**63}, "n"),
        (CHAT, {"parse": {"full": 0.1}}, "parse.full"),
        (CHAT, {"max_tokens": 2**63}, "messages"),
        (COMPLETIONS, {"prompt": [510]}, "prompt"),
        (COMPLETIONS, {"prompt": [10**4299]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 17}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 9}, "n"),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 10**4299}, "n"),
    ],
)
def test_requests_beyond_the_limits_of_model_and_operator_are_rejected(raw, path, body, param):
    usual = {"model": MODEL} | ({"messages": HELLO} if path == CHAT else {})
    assert error_of(raw.post(path, json=usual | body), 400)["param"] == param


def test_long_bodies_are_rejected_with_any_transfer_encoding(raw):
    long = b"x" * 10_000_000
    chunks = (long[:100_000] for _ in range(100))
    for content in (long, chunks):
        error = error_of(raw.post(CHAT, content=content, headers=JSON), 413)
        assert (error["param"], error["code"]) == ("body", "too_long")


def test_a_body_at_the_length_limit_is_accepted(raw):
    max_bytes = ApiSettings().max_body_bytes
    body = json.dumps(BODY)
    assert raw.post(CHAT, content=body + " " * (max_bytes - len(body)), headers=JSON).status_code == 200
    error_of(raw.post(CHAT, content=body + " " * (max_bytes - len(body) + 1), headers=JSON), 413)


@pytest.mark.parametrize("sent", [b"", b'{"model": '])
def test_a_client_that_sends_too_slowly_gets_a_408(pair, sent):
    with serving(pair, body_timeout_s=0.1) as address:
        with connected(address, sent, length=100) as client:
            raw_response = b"".join(iter(lambda: client.recv(10_000), b""))  # until the server closes the connection
        head, _, body = raw_response.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ") and json.loads(body)["error"]["param"] == "body"
        until(lambda: post(address).status_code == 200)  # on a busy machine, a body can take longer than the limit


def test_clients_that_disconnect_while_sending_leave_nothing_behind(pair):
    with serving(pair, max_answers=1, max_queued_requests=0) as address:
        for sent in (b"", b'{"model": ', json.dumps(BODY).encode()[:-1]):
            with connected(address, sent, length=1000):
                pass
        assert post(address).status_code == 200


# Paths.


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/%00%ff", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_unknown_paths_and_methods_have_the_same_error_format(raw, method, path, status):
    error_of(raw.request(method, path), status)


@pytest.mark.parametrize("name", ["other", "", MODEL.upper(), f"{MODEL} ", "\x00", "x" * 100_000])
def test_a_request_for_another_model_is_rejected(raw, name):
    error = error_of(raw.post(CHAT, json=BODY | {"model": name}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found") and MODEL in error["message"]


def test_readiness_reports_unavailable_parts(pair):
    backend = LocalBackend(pair.pipeline)
    with served(create_app(backend, ApiSettings(), MODEL)) as address:
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        for wrong, status, word in (
            ({}, 200, "ready"),
            ({"drafter": "is away"}, 200, "degraded"),
            ({"verifier": "is away"}, 503, "unavailable"),
        ):
            backend.wrong = wrong
            response = httpx.get(f"{address}/ready")
            expected = {"status": word, "troubles": wrong, "deployment": None}
            assert (response.status_code, response.json()) == (status, expected)
            assert httpx.get(f"{address}/health").status_code == 200


# Keys.


def test_with_keys_only_clients_with_a_key_are_served_and_keys_are_not_logged(pair, tmp_path, monkeypatch, caplog):
    (tmp_path / "keys").write_text("sesame-one\n")
    monkeypatch.setenv("OUR_KEYS", "sesame-two")
    settings = ApiSettings(api_keys_file=str(tmp_path / "keys"), api_keys_env="OUR_KEYS")
    caplog.set_level(logging.DEBUG)
    with served(create_app(LocalBackend(pair.pipeline), settings, MODEL), log_level="debug") as address:
        for key in ("sesame-one", "sesame-two"):
            with OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
                assert [model.id for model in client.models.list()] == [MODEL]
                assert client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1).choices
        with OpenAI(base_url=f"{address}/v1", api_key="sesame-three", max_retries=0) as client:
            for ask in (client.models.list, lambda: client.chat.completions.create(model=MODEL, messages=HELLO)):
                with pytest.raises(openai.AuthenticationError):
                    ask()
        assert "sesame" not in error_of(post(address), 401)["message"]
        odd = {b"authorization": b"Bearer \xff\xfe"}
        error_of(httpx.post(f"{address}{CHAT}", content=b"{", headers=odd), 401)
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert httpx.get(f"{address}{path}").status_code == 200
    logs = [record.getMessage() for record in caplog.records if record.name.partition(".")[0] not in CLIENTS]
    assert any("401" in line for line in logs)  # the records include the access log
    assert not any("sesame" in line for line in logs)


@pytest.mark.parametrize("forwarded", ["192.0.2.1", "unknown", "127.0.0.1.example.org"])
def test_without_keys_clients_behind_a_proxy_are_rejected(raw, forwarded):
    error = error_of(raw.post(CHAT, json=BODY, headers={"x-forwarded-for": forwarded}), 401)
    assert error["code"] == "no_keys"


# Concurrency and timeouts.


def test_a_full_queue_rejects_requests_with_retry_after(pair):
    writer = Writer()
    with serving(pair, writer, max_answers=2, max_queued_requests=2) as address, ThreadPoolExecutor(20) as clients:
        futures = [clients.submit(post, address) for _ in range(20)]
        finished = as_completed(futures, timeout=PATIENCE_S)
        for _ in range(16):
            response = next(finished).result()
            assert error_of(response, 503)["code"] == "overloaded"
            assert 1 <= int(response.headers["retry-after"]) <= 60
        assert writer.busy == 2
        writer.may_go_on.set()
        assert [future.result().status_code for future in finished] == [200] * 4
        for _ in range(3):
            assert post(address, BODY | {"n": 2}).status_code == 200


def test_all_clients_are_served_if_they_retry(pair):
    with serving(pair, max_answers=2, max_queued_requests=2) as address, ThreadPoolExecutor(10) as clients:

        def ask(place: int) -> int:
            """Sends a request and repeats it after each 503."""
            for _ in range(1000):
                response = post(address, BODY | {"stream": place % 2 == 0, "n": 1 + place % 2})
                if response.status_code != 503:
                    break
                time.sleep(0.05)
            return response.status_code

        assert set(clients.map(ask, range(10))) == {200}
    until(lambda: pair.target.stats.num_running == pair.target.stats.num_waiting == 0)


def test_more_answers_than_slots_are_rejected(pair):
    with serving(pair, max_answers=3) as address:
        assert post(address, BODY | {"n": 3}).status_code == 200
        assert error_of(post(address, BODY | {"n": 4}), 400)["param"] == "n"


@pytest.mark.parametrize("stream", [False, True])
def test_a_slow_answer_fails_with_a_504(pair, stream):
    writer = Writer()
    with serving(pair, writer, request_timeout_s=0.1, max_answers=1) as address:
        for _ in range(2):
            assert error_of(post(address, BODY | {"stream": stream}), 504)["code"] == "timeout"
        until(lambda: writer.busy == 0)


def test_a_long_wait_in_the_queue_fails_with_a_504(pair):
    writer = Writer()
    with serving(pair, writer, request_timeout_s=0.3, max_answers=1) as address, ThreadPoolExecutor(3) as clients:
        for response in clients.map(lambda _: post(address), range(3)):
            error_of(response, 504)


def events(response: httpx.Response) -> list[Any]:
    """Returns the events of a complete stream, without the final [DONE]."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    *lines, end, rest = response.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_slow_stream_ends_with_a_timeout_error(pair, monkeypatch):
    """The time limit of the request expires when the target has generated two tokens, on any machine."""
    limit_s, limits, timeout = 1000.0, [], asyncio.timeout

    def recorded(seconds: float | None) -> asyncio.Timeout:
        limit = timeout(seconds)
        if seconds == limit_s:
            limits.append(limit)
        return limit

    class Slow(Writer):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
            yield TokenDelta((300, 301))
            (limit,) = limits
            limit.reschedule(asyncio.get_running_loop().time())
            await asyncio.Event().wait()

    monkeypatch.setattr(asyncio, "timeout", recorded)
    with serving(pair, Slow(), request_timeout_s=limit_s) as address:
        response = post(address, BODY | {"stream": True})
        *chunks, failed = events(response)
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in chunks)
        assert failed["error"]["code"] == "timeout"


# Internal errors.

SECRET = "the verifier at 10.1.2.3 burns"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_internal_error_reveals_no_details(pair, caplog, path, stream):
    body = {"model": MODEL, "prompt": "x"} if path == COMPLETIONS else BODY
    with serving(pair, Writer(error=RuntimeError(SECRET)), max_answers=1) as address:
        for _ in range(2):
            error = error_of(post(address, body | {"stream": stream}, path), 500)
            assert (error["type"], error["code"]) == ("server_error", "internal_error")
            assert SECRET not in json.dumps(error)
    assert SECRET in caplog.text  # the log has the details


def test_an_internal_timeout_reveals_no_details(pair):
    with serving(pair, Writer(error=TimeoutError(SECRET))) as address:
        assert SECRET not in error_of(post(address), 504)["message"]


def test_an_error_in_a_stream_is_sent_in_the_stream(pair, caplog):
    with serving(pair, Writer([300, 301], error=RuntimeError(SECRET)), max_answers=1) as address:
        for _ in range(2):
            response = post(address, BODY | {"stream": True})
            *chunks, failed = events(response)
            assert chunks and failed["error"]["code"] == "internal_error" and SECRET not in response.text
        with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            with pytest.raises(openai.APIError, match="an internal error occurred"):
                list(stream)
    assert SECRET in caplog.text


def test_errors_outside_of_answers_have_the_same_format(pair, caplog):
    class Broken(LocalBackend):
        def unavailable_parts(self) -> dict[str, str]:
            raise RuntimeError(SECRET)

    with served(create_app(Broken(pair.pipeline), ApiSettings(), MODEL)) as address:
        response = httpx.get(f"{address}/ready")
        assert error_of(response, 500)["code"] == "internal_error" and SECRET not in response.text
        assert post(address).status_code == 200


def test_a_failed_choice_ends_all_choices_of_the_request(pair):
    class Half(Writer):
        def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
            self.error = RuntimeError(SECRET) if self.busy else None
            return super().generate(request)

    writer = Half()
    with serving(pair, writer, max_answers=3) as address:
        error_of(post(address, BODY | {"n": 3}), 500)
        until(lambda: writer.busy == 0)


# Clients that disconnect.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("target_tokens", [[], [300, 301]])
def test_the_work_for_a_client_that_disconnects_is_cancelled(pair, stream, target_tokens):
    writer = Writer(target_tokens)  # the answer never finishes unless `may_go_on` is set
    body = json.dumps(BODY | {"stream": stream, "n": 2}).encode()
    with serving(pair, writer, max_answers=2, max_queued_requests=0) as address:
        with connected(address, body) as client:
            until(lambda: writer.busy == 2)
            if stream and target_tokens:
                assert client.recv(1)
            assert error_of(post(address), 503)
        until(lambda: writer.busy == 0)
        writer.may_go_on.set()
        assert post(address, BODY | {"n": 2}).status_code == 200  # both slots are free again


def test_generation_ends_with_its_stream_even_if_the_exception_is_kept(pair):
    writer = Writer([300, 301])
    pipeline = replace(pair.pipeline, verifier=cast(Verifier, writer), drafter=None)
    app = create_app(LocalBackend(pipeline), ApiSettings(), MODEL)
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": CHAT,
    }
    scope |= {"headers": [(b"content-type", b"application/json")], "client": ("::1", 1), "query_string": b""}
    messages = [{"type": "http.request", "body": json.dumps(BODY | {"stream": True}).encode()}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message.get("body"):
            raise OSError("the connection is lost")

    async def check() -> None:
        with pytest.raises(ClientDisconnect) as kept:
            await app(scope, receive, send)
        for _ in range(1000):
            if not writer.busy:
                break
            await asyncio.sleep(0.005)
        assert kept.tb and not writer.busy

    asyncio.run(check())


def test_a_client_that_disconnects_in_the_queue_lets_the_next_one_in(pair):
    writer = Writer()
    body = json.dumps(BODY).encode()
    with serving(pair, writer, max_answers=1, max_queued_requests=1) as address, connected(address, body) as first:

        def refused() -> bool:
            """Returns whether a request is rejected. A request that waits is cancelled."""
            with connected(address, body) as client:
                client.settimeout(0.2)
                try:
                    return client.recv(12) == b"HTTP/1.1 503"
                except TimeoutError:
                    return False

        until(lambda: writer.busy == 1)
        with connected(address, body):
            until(refused)
        until(lambda: not refused())
        writer.may_go_on.set()
        assert first.recv(12) == b"HTTP/1.1 200"
        assert post(address).status_code == 200


def test_an_unread_stream_releases_the_engine(pair, raw):
    before = pair.target.stats.num_tokens
    endless = BODY | {"stream": True, "max_tokens": 900, "ignore_eos": True}
    with raw.stream("POST", CHAT, json=endless) as response:
        next(response.iter_bytes())
        assert pair.target.stats.num_running == 1
    until(lambda: pair.target.stats.num_running == pair.target.stats.num_waiting == 0)
    assert pair.target.stats.num_tokens - before < 800  # the answer had not reached its end


# Interpretation of requests.


def parse(pair: Pair, body: dict[str, Any], **settings: Any) -> ParsedRequest:
    parser = RequestParser(pair.pipeline, ApiSettings(**settings), MODEL)
    if "prompt" in body:
        return asyncio.run(parser.parse_completion(CompletionRequest.model_validate({"model": MODEL} | body)))
    return asyncio.run(
        parser.parse_chat(ChatCompletionRequest.model_validate({"model": MODEL, "messages": HELLO} | body))
    )


def test_the_part_of_a_prediction_beyond_the_context_is_ignored(pair):
    body = {"prediction": {"type": "content", "content": "x" * 100_000}, "stop": ["no such thing"]}
    (request,) = parse(pair, body).generation_requests
    assert request.prediction is not None and len(request.prediction) <= pair.pipeline.capabilities.max_model_len


@pytest.mark.parametrize(
    ("modes", "chat", "completion"),
    [(("auto", "off", "full"), "auto", "off"), (("off",), "off", "off"), (("full", "exact"), "full", "full")],
)
def test_the_default_mode_is_one_that_the_operator_allows(pair, modes, chat, completion):
    assert parse(pair, {}, modes=modes).generation_requests[0].mode == chat
    assert parse(pair, {"prompt": "x"}, modes=modes).generation_requests[0].mode == completion


def test_modes_that_the_operator_does_not_allow_are_rejected(pair):
    with serving(pair, modes=("full", "off")) as address:
        for mode in ("full", "off"):
            assert post(address, BODY | {"parse": {"mode": mode}}).json()["parse"]["mode"] == mode
        for mode in ("auto", "rounds", "exact", "progressive"):
            error = error_of(post(address, BODY | {"parse": {"mode": mode}}), 400)
            assert error["param"] == "parse.mode" and "full, off" in error["message"]


def test_a_request_chooses_its_method_which_changes_the_report_but_not_the_text(address):
    (card,) = httpx.get(f"{address}/v1/models").json()["data"]
    assert (card["parse"]["methods"], card["parse"]["speculation"]) == (["parallel", "ngram", "none"], "parallel")
    request: list[Any] = [{"role": "user", "content": draw_problems(3, 1, split="service")[0].question}]
    body = BODY | {"messages": request, "temperature": 0, "max_tokens": 60}
    texts = set()
    for choice in (None, "parallel", "ngram", "none"):
        answer = post(address, body | {"parse": {"mode": "off", "speculation": choice}}).json()
        texts.add(answer["choices"][0]["message"]["content"])
        speculation, target_tokens = answer["parse"]["speculation"], answer["parse"]["written"]
        if choice == "none":
            assert speculation is None
            continue
        assert speculation["method"] == (choice or "parallel") and speculation["tokens"] == target_tokens
        assert speculation["tokens_per_pass"] == speculation["tokens"] / speculation["passes"]
        # A pass gives the accepted tokens and one more. Only the last pass may end earlier.
        assert speculation["tokens"] <= speculation["passes"] + speculation["accepted"] <= speculation["tokens"] + 1
        assert speculation["proposed"] == sum(place["proposed"] for place in speculation["places"])
        assert speculation["accepted"] == sum(place["accepted"] for place in speculation["places"])
        assert choice == "ngram" or speculation["tokens_per_pass"] > 2
    assert len(texts) == 1


def test_a_method_that_is_not_loaded_is_rejected_with_the_loaded_ones(address, pair):
    error = error_of(post(address, BODY | {"parse": {"speculation": "eagle3"}}), 400)
    assert (error["param"], error["code"]) == ("parse.speculation", "invalid_value")
    assert "parallel, ngram, none, got eagle3" in error["message"]
    with served(create_app(LocalBackend(without_methods(pair.pipeline)), ApiSettings(), MODEL)) as bare:
        card = httpx.get(f"{bare}/v1/models").json()["data"][0]["parse"]
        assert (card["methods"], card["speculation"]) == (["none"], "none")
        assert error_of(post(bare, BODY | {"parse": {"speculation": "ngram"}}), 400)["param"] == "parse.speculation"
        answer = post(bare, BODY | {"parse": {"mode": "off", "speculation": "none"}})
        assert answer.json()["parse"]["speculation"] is None


def test_a_completion_can_choose_a_method(pair):
    parsed = parse(pair, {"prompt": "x", "n": 2, "parse": {"speculation": "ngram"}})
    assert [request.speculative_method for request in parsed.generation_requests] == ["ngram"] * 2
    assert parse(pair, {"prompt": "x"}).generation_requests[0].speculative_method is None


def test_requests_of_a_conversation_have_the_same_session_key(pair):
    def key(body: dict[str, Any]) -> str:
        return parse(pair, body).choices[0].session.id

    def talk(*texts: str) -> dict[str, Any]:
        roles = ["user", "assistant"] * len(texts)
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}

    assert key(talk("Hello", "Hi", "What?")) == key(talk("Hello")) != key(talk("Good day"))
    assert key({"prompt_cache_key": "k", "user": "a"}) == key({"prompt_cache_key": "k", "user": "b"}) == "k"
    assert key({"user": "a"}) != key({"user": "b"})
    assert key({"prompt": "One text"}) == key({"prompt": "One text"}) != key({"prompt": "Another"})
    system = {"messages": [{"role": "system", "content": "Be brief."}, *HELLO]}
    assert key(system) != key({})


def test_only_streams_request_small_deltas(pair):
    assert parse(pair, {"stream": True}).generation_requests[0].stream_interval == 1
    assert parse(pair, {}).generation_requests[0].stream_interval > 1


@pytest.mark.parametrize(
    ("parse", "learns"),
    [
        ({}, True),
        ({"mode": "auto"}, True),
        ({"mode": "full"}, False),
        ({"full": 0.99}, False),
        ({"prefix": 0.9}, False),
    ],
    ids=str,
)
def test_the_controller_of_auto_learns_from_requests_without_choices_of_their_own(
    pair: Pair, parse: dict[str, Any], learns: bool
) -> None:
    pipeline = replace(pair.pipeline, controller=DraftingController())
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": draw_problems(9, 1)[0].question}],
        "temperature": 0,
        "parse": parse,
    }
    with served(create_app(LocalBackend(pipeline), ApiSettings(), MODEL)) as address:
        response = httpx.post(address + CHAT, json=body, timeout=PATIENCE_S).json()
    assert response["parse"]["drafted"], response
    assert (vars(pipeline.controller) != vars(DraftingController())) == learns
