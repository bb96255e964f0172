"""Clients with endless, slow or many headers are rejected, and idle connections are closed."""

import json
import socket
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn.protocols.http.auto
from fastapi import FastAPI, Request

from deployments.serving import connection_limits
from deployments.serving.connection_limits import MAX_HEADER_BYTES, MAX_HEADERS, install
from tests.deployments.live import served


@pytest.fixture(autouse=True)
def limited(monkeypatch):
    """Installs the limits, and restores uvicorn's protocol after the test."""
    monkeypatch.setattr(uvicorn.protocols.http.auto, "AutoHTTPProtocol", uvicorn.protocols.http.auto.AutoHTTPProtocol)
    assert install() == []


@pytest.fixture
def address():
    app = FastAPI()

    @app.post("/length")
    async def length(request: Request) -> int:
        return len(await request.body())

    with served(app) as address:
        yield address


@contextmanager
def connection(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        yield sock


def response_of(sock):
    """Returns status, headers and body; the server has to close the connection."""
    received = b""
    try:
        while part := sock.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else None, head.lower(), body


def test_requests_within_the_limits_are_served_one_after_another_on_one_connection(address):
    with httpx.Client(base_url=address) as client:
        for size in (0, 10, 3_000_000, 5):
            response = client.post("/length", content=b"x" * size, headers={"X-Long": "y" * (MAX_HEADER_BYTES // 2)})
            assert response.json() == size


@pytest.mark.parametrize("in_two_packets", [False, True])
def test_an_offer_of_http2_is_ignored(address, in_two_packets):
    """As Java's HttpClient sends it. Without care, the parser drops the body."""
    text = b"a body\r\nUpgrade: h2c\r\n\r\n"
    head = b"POST /length HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: %d\r\nHost: localhost\r\n"
    head += b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\nUser-Agent: Java\r\n\r\n"
    with connection(address) as sock:
        for connection_header in (b"Upgrade, HTTP2-Settings", b"Upgrade, HTTP2-Settings, close"):
            request = head.replace(b"Upgrade, HTTP2-Settings", connection_header) % len(text)
            sock.sendall(request if in_two_packets else request + text)
            if in_two_packets:
                time.sleep(0.1)
                sock.sendall(text)
            if b"close" not in connection_header:
                assert sock.recv(65536).endswith(b"%d" % len(text))
        status, _, body = response_of(sock)
    assert (status, body) == (200, b"%d" % len(text))


@pytest.mark.parametrize("name", ["one header", "many short headers", "the url"])
def test_endless_headers_end_the_connection(address, name):
    pieces = {"one header": b"y" * 10_000, "many short headers": b"a: b\r\n" * 1000, "the url": b"y" * 10_000}
    start = b"POST /length" if name == "the url" else b"POST /length HTTP/1.1\r\nHost: localhost\r\nX-Long: "
    sent = 0
    with connection(address) as sock:
        sock.sendall(start)
        try:
            while sent < 100_000_000:
                sock.sendall(pieces[name])
                sent += len(pieces[name])
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert sent < 10_000_000  # what the buffers of the system hold


def test_headers_that_are_too_long_get_a_431(address):
    with connection(address) as sock:
        sock.sendall(b"POST /length HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"y" * (MAX_HEADER_BYTES + 1))
        status, head, body = response_of(sock)
    assert status == 431 and b"connection: close" in head
    assert json.loads(body)["error"]["message"].startswith("the headers must be at most")


def test_too_many_headers_get_a_431(address):
    with connection(address) as sock:
        sock.sendall(b"POST /length HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n")
        status, _, body = response_of(sock)
    assert status == 431 and b"at most 128 headers" in body


def test_headers_that_do_not_end_in_time_get_a_408(address, monkeypatch):
    monkeypatch.setattr(connection_limits, "REQUEST_TIMEOUT_S", 0.3)
    with connection(address) as sock:
        for part in (b"POST /length HTTP/1.1\r\n", b"a: b\r\n", b"a: b\r\n", b"a: b\r\n", b"a: b\r\n"):
            try:
                sock.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.15)
        status, _, body = response_of(sock)
    assert status == 408 and b"must arrive within" in body


def test_a_connection_without_a_request_is_closed(address, monkeypatch):
    monkeypatch.setattr(connection_limits, "REQUEST_TIMEOUT_S", 0.2)
    with connection(address) as sock:
        assert response_of(sock) == (None, b"", b"")


def test_endless_trailers_end_the_connection_even_after_the_answer(address):
    sent = 0
    with connection(address) as sock:
        sock.sendall(b"POST /length HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.sendall(b"3\r\nabc\r\n0\r\nX: ")
        try:
            while sent < 100_000_000:
                sock.sendall(b"y" * 10_000)
                sent += 10_000
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert sent < 10_000_000


@pytest.fixture
def slow_address(monkeypatch):
    """An app that answers slowly, and one that answers before it has read the body."""
    monkeypatch.setattr(connection_limits, "REQUEST_TIMEOUT_S", 0.3)
    app = FastAPI()

    @app.get("/slow")
    def slow() -> str:
        time.sleep(1)
        return "done"

    @app.post("/early")
    async def early() -> str:
        return "done"

    with served(app) as address:
        yield address


def test_the_limit_of_time_does_not_apply_to_the_answer(slow_address):
    with httpx.Client(base_url=slow_address) as client:
        assert [client.get("/slow").json() for _ in range(2)] == ["done", "done"]


def test_a_pipelined_request_does_not_cut_the_response_before_it(slow_address):
    request = b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connection(slow_address) as sock:
        sock.sendall(request + request + request[:20])
        time.sleep(0.1)
        sock.sendall(request[20:-2] + b"Connection: close\r\n\r\n")
        received = b""
        while part := sock.recv(65536):
            received += part
    assert received.count(b"200 OK") == 3 and received.count(b"done") == 3


def test_a_request_that_does_not_end_after_its_answer_is_closed(slow_address):
    with connection(slow_address) as sock:
        sock.sendall(b"POST /early HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        status, _, _ = response_of(sock)
    assert status == 200


def test_white_space_after_a_request_does_not_keep_the_connection_open(slow_address):
    with connection(slow_address) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"done" in sock.recv(65536)
        sock.sendall(b"\r\n")
        assert response_of(sock)[0] == 408
