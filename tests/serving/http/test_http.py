"""HTTP as proxies, probes and libraries of other languages speak it."""

from __future__ import annotations

import json
import socket
from http.client import HTTPResponse

import httpx
import pytest

from tests.serving.http.conftest import KEY
from tests.serving.http.live import MODEL, LiveServer

ASK = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
JSON = {"Content-Type": "application/json"}


def answers(server: LiveServer, data: bytes, methods: list[str]) -> list[tuple[int, bytes]]:
    """Send bytes at once and read one response for each method on the same connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
        link.sendall(data)
        file = link.makefile("rb")
        found = []
        for method in methods:
            answer = HTTPResponse(_Kept(file), method=method)
            answer.begin()
            found.append((answer.status, answer.read()))
        return found


class _Kept:
    """A socket to ``HTTPResponse`` whose file several responses share, so that none reads ahead."""

    def __init__(self, file):
        self._file = file

    def makefile(self, mode):
        return self

    def __getattr__(self, name):
        return getattr(self._file, name)

    def close(self):
        pass


def head(method: str, target: str, length: int | None = None, version: str = "1.1") -> bytes:
    lines = [f"{method} {target} HTTP/{version}", "Host: x", "Content-Type: application/json"]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/version", "/v1/models", f"/v1/models/{MODEL}", "/metrics"]
)
def test_head_is_get_without_the_body(server: LiveServer, path):
    with server.client() as client:
        asked, whole = client.head(path), client.get(path)
    assert asked.status_code == whole.status_code == 200
    assert asked.content == b""
    assert asked.headers["content-type"] == whole.headers["content-type"]
    if path != "/metrics":  # figures that change
        assert asked.headers["content-length"] == whole.headers["content-length"]


def test_head_leaves_the_connection_ready_for_the_next_request(server: LiveServer):
    data = head("HEAD", "/health") + head("GET", "/version")
    (status, body), (_, version) = answers(server, data, ["HEAD", "GET"])
    assert (status, body) == (200, b"")
    assert "version" in json.loads(version)


def test_head_opens_no_door(locked_server: LiveServer):
    assert httpx.head(f"{locked_server.url}/v1/models").status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.head(f"{locked_server.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("method", ["HEAD", "GET", "OPTIONS", "PUT"])
def test_what_takes_a_post_alone_says_so(server: LiveServer, method):
    answer = httpx.request(method, f"{server.url}/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "target",
    [
        "http://x/v1/completions",
        "HTTP://other:8000/v1/completions",
        "https://x/v1/completions/",
        "http://x/v1/completions?a=1",
    ],
)
def test_a_target_with_scheme_and_host_is_its_path(server: LiveServer, target):
    ((status, body),) = answers(server, head("POST", target, len(ASK)) + ASK, ["POST"])
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 1


def test_a_host_alone_is_no_route(server: LiveServer):
    ((status, _),) = answers(server, head("GET", "http://x"), ["GET"])
    assert status == 404


def test_requests_sent_at_once_are_answered_in_their_order(server: LiveServer):
    streamed = json.dumps({"prompt": "a", "max_tokens": 3, "stream": True}).encode()
    wrong = b'{"prompt": 5}'
    parts = [
        head("POST", "/v1/completions", len(wrong)) + wrong,
        head("POST", "/v1/completions", len(streamed)) + streamed,
        head("PUT", "/v1/completions", len(ASK)) + ASK,
        head("POST", "/nowhere", len(ASK)) + ASK,
        head("GET", "/health"),
        head("POST", "/v1/completions", len(ASK)) + ASK,
    ]
    found = answers(server, b"".join(parts), ["POST", "POST", "PUT", "POST", "GET", "POST"])
    assert [status for status, _ in found] == [400, 200, 405, 404, 200, 200]
    assert found[1][1].endswith(b"data: [DONE]\n\n")
    assert json.loads(found[5][1])["object"] == "text_completion"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ('Application/JSON; Charset="UTF-8"', 200),
        ("application/json;charset=utf8", 200),
        ("application/json; charset=utf-8;", 200),
        ("application/json; profile=x; charset=utf-8", 200),
        ("application/json; charset=latin-1", 415),
        ("application/json; charset=utf-8; charset=utf-16", 415),
        ("application/jsonx", 415),
        ("text/json", 415),
    ],
)
def test_json_is_utf_8_however_its_type_is_written(server: LiveServer, kind, status):
    answer = httpx.post(f"{server.url}/v1/completions", content=ASK, headers={"Content-Type": kind})
    assert answer.status_code == status


def test_a_request_that_would_upgrade_is_answered_and_needs_no_package(server: LiveServer):
    for protocol in ("websocket", "h2c"):
        headers = {"Connection": "Upgrade", "Upgrade": protocol}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    assert "pip install" not in server.log
    assert "upgrade" not in server.log.lower()
