import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from deployments.api.limits import RequestLimitsMiddleware, load_api_keys
from deployments.api.response_models import ErrorResponse

HERE, ELSEWHERE = ("127.0.0.1", 5000), ("192.0.2.7", 5000)
CHAT = "/v1/chat/completions"
LEFT: Message = {"type": "http.disconnect"}


@dataclass
class CapturedResponse:
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return ErrorResponse.model_validate_json(self.body).error.model_dump()


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Responds with the body of the request and the type of the next message."""
    first, second = await receive(), await receive()
    assert not first["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"then", second["type"].encode())]})
    await send({"type": "http.response.body", "body": first["body"]})


def send_request(
    *messages: Message,
    path: str = CHAT,
    client: tuple[str, int] | None = HERE,
    headers: Sequence[tuple[bytes, bytes]] = (),
    keys: Sequence[str] = (),
    max_bytes: int = 100,
    patience: float = 10.0,
    root_path: str = "",
) -> CapturedResponse:
    """Returns the response to a client that sends these messages and nothing else."""
    incoming, sent = list(messages or [part(b"")]), []
    if incoming[-1] != LEFT and not incoming[-1]["more_body"]:
        incoming.append(LEFT)

    async def receive() -> Message:
        if not incoming:
            await asyncio.Event().wait()
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    app = RequestLimitsMiddleware(echo, keys=keys, max_body_bytes=max_bytes, body_timeout_s=patience)
    scope = dict(type="http", path=path, client=client, headers=list(headers), root_path=root_path, method="POST")
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    start, *bodies = sent
    return CapturedResponse(
        start["status"], dict(start["headers"]), b"".join(message.get("body", b"") for message in bodies)
    )


def part(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def bearer(key: str | bytes) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + (key.encode() if isinstance(key, str) else key))]


# Authentication.


@pytest.mark.parametrize(
    "client", [HERE, ("127.8.8.8", 1), ("::1", 1), ("::ffff:127.0.0.1", 1), ("0:0:0:0:0:0:0:1", 1), None]
)
def test_without_keys_clients_on_this_machine_are_served(client):
    assert send_request(client=client).status == 200


@pytest.mark.parametrize(
    "client",
    ["192.0.2.7", "10.0.0.1", "0.0.0.0", "2001:db8::1", "::ffff:10.0.0.1", "fe80::1%eth0", "unknown", "localhost", ""],
)
def test_without_keys_clients_on_other_machines_are_rejected(client):
    response = send_request(client=(client, 1))
    assert response.status == 401 and response.error["code"] == "no_keys"


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "localhost.", "a.localhost", "127.0.0.1:8000", "127.8.8.8", "[::1]:8000", ""],
)
def test_without_keys_requests_that_name_this_machine_are_served(host):
    assert send_request(headers=[(b"host", host.encode())]).status == 200


@pytest.mark.parametrize(
    "host", ["a.example", "a.example:8000", "127.0.0.1.example", "192.0.2.7", "[2001:db8::1]", "[::1]a.example", "[::1"]
)
def test_without_keys_requests_under_another_name_are_rejected(host):
    """Such a request can come from a web page whose name resolves to this machine (DNS rebinding)."""
    response = send_request(headers=[(b"host", host.encode())])
    assert response.status == 401 and response.error["code"] == "no_keys" and "Host" in response.error["message"]
    assert send_request(headers=[(b"host", host.encode()), *bearer("one")], keys=["one"]).status == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/x", "/v1", "/x"])
@pytest.mark.parametrize("root_path", ["", "/parse", "/a/b"])
def test_with_keys_every_request_needs_one_under_any_route_prefix(path, root_path):
    def status(headers: list[tuple[bytes, bytes]]) -> int:
        return send_request(path=root_path + path, root_path=root_path, headers=headers, keys=["one", "two"]).status

    assert status([]) == 401
    assert status(bearer("three")) == 401
    assert status(bearer("one")) == status(bearer("two")) == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/openapi.json"])
@pytest.mark.parametrize("root_path", ["", "/parse"])
def test_health_and_documentation_need_no_key(path, root_path):
    for keys in ([], ["one"]):
        assert send_request(path=root_path + path, root_path=root_path, client=ELSEWHERE, keys=keys).status == 200


@pytest.mark.parametrize("path", ["//v1/models", "/health/../v1/models", "/docs/v1/models", "/healthx", "/HEALTH"])
def test_paths_similar_to_open_ones_need_a_key(path):
    assert send_request(path=path, keys=["one"]).status == 401


def test_with_keys_all_clients_are_served_and_local_ones_need_a_key_too():
    assert send_request(client=ELSEWHERE, keys=["one"], headers=bearer("one")).status == 200
    response = send_request(client=HERE, keys=["one"])
    assert response.status == 401 and response.error["type"] == "authentication_error"
    assert response.headers[b"www-authenticate"] == b"Bearer"


@pytest.mark.parametrize(
    "sent",
    [
        *(b"", b"one", b"Bearer", b"Bearer ", b"Basic one", b"Bearer on", b"Bearer onee", b"Bearer one two"),
        *(b"Bearer ONE", b"Bearer \xff\xfe", b"\xff\xfe one", b"Bearer \xc3\xa9", b"Bearer one\x00", b" " * 10_000),
    ],
)
def test_a_wrong_key_is_rejected(sent):
    assert send_request(keys=["one", "zwei"], headers=[(b"authorization", sent)]).status == 401


@pytest.mark.parametrize("sent", [b"Bearer one", b"bearer one", b"BEARER  one "])
def test_the_header_may_have_any_form_that_http_allows(sent):
    assert send_request(keys=["one"], headers=[(b"authorization", sent)]).status == 200


def test_a_key_may_contain_characters_outside_ascii():
    assert send_request(keys=["schlüssel"], headers=bearer("schlüssel")).status == 200
    assert send_request(keys=["schlüssel"], headers=bearer("schlussel")).status == 401


def test_keys_are_not_revealed(caplog):
    caplog.set_level(logging.DEBUG)
    for key in ("sesame-open", "sesame-closed"):
        response = send_request(keys=["sesame-open"], headers=bearer(key))
        assert b"sesame" not in (b"" if response.status == 200 else response.body)
    assert "sesame" not in caplog.text


def test_keys_are_read_from_a_file_and_from_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n")
    monkeypatch.setenv("OUR_KEYS", "three, four,,")
    assert load_api_keys(str(file), "OUR_KEYS") == ("one", "two", "three", "four")
    assert load_api_keys(None, "OUR_KEYS") == ("three", "four")
    assert load_api_keys(str(file), "NOT_SET") == ("one", "two")
    assert load_api_keys(None, "NOT_SET") == ()


def test_a_file_without_keys_is_an_error_and_does_not_open_the_server(tmp_path):
    (tmp_path / "keys").write_text("\n \n")
    with pytest.raises(ValueError, match="contains no key"):
        load_api_keys(str(tmp_path / "keys"), "NOT_SET")
    with pytest.raises(FileNotFoundError):
        load_api_keys(str(tmp_path / "none"), "NOT_SET")


# Limits on bodies.


@settings(derandomize=True, deadline=None, max_examples=60)
@given(parts=st.lists(st.binary(max_size=40), min_size=1, max_size=6), max_bytes=st.integers(0, 120))
def test_a_body_is_passed_on_complete_or_rejected_as_too_long(parts, max_bytes):
    messages = [part(body, more=place < len(parts) - 1) for place, body in enumerate(parts)]
    response = send_request(*messages, LEFT, max_bytes=max_bytes)
    body = b"".join(parts)
    if len(body) > max_bytes:
        assert response.status == 413 and response.error["code"] == "too_long" and response.error["param"] == "body"
    else:
        assert (response.status, response.body) == (200, body)
        assert response.headers[b"then"] == b"http.disconnect"  # the next message comes from the client


@pytest.mark.parametrize("declared", [b"101", b"10000000", b"9" * 30])
def test_a_body_with_a_declared_length_above_the_limit_is_rejected_unread(declared):
    response = send_request(part(b"", more=True), headers=[(b"content-length", declared)])
    assert response.status == 413 and "100" in response.error["message"]


@pytest.mark.parametrize("declared", [b"", b"-1", b"1e9", b"many", b"\xb2", b"0x10"])
def test_a_declared_length_that_is_not_a_number_is_ignored(declared):
    assert send_request(part(b"short"), headers=[(b"content-length", declared)]).body == b"short"


def test_a_client_that_stops_sending_gets_a_408():
    response = send_request(part(b"{", more=True), patience=0.01)
    assert response.status == 408 and response.error["param"] == "body"
    assert response.headers[b"connection"] == b"close"


def test_a_client_that_disconnects_ends_the_request():
    assert send_request(part(b"{", more=True), LEFT).status == 499


@pytest.mark.parametrize("path", ["/health", CHAT])
def test_the_limits_of_a_body_apply_to_all_paths(path):
    assert send_request(part(b"x" * 101), path=path).status == 413


def test_rejections_have_the_format_of_the_openai_api():
    response = send_request(part(b"x" * 101))
    assert json.loads(response.body).keys() == {"error"}
    assert response.error == {
        "message": "body: must be at most 100 bytes long",
        "type": "invalid_request_error",
        "param": "body",
        "code": "too_long",
    }
    assert response.headers[b"content-type"] == b"application/json"


def test_scopes_other_than_http_are_passed_on():
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    limits = RequestLimitsMiddleware(app, keys=["one"], max_body_bytes=1, body_timeout_s=1)
    asyncio.run(limits({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
