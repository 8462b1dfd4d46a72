"""Hostile clients: junk, floods and slow senders. The next honest client is answered at once."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from http.client import HTTPResponse

import httpx
import pytest

from tests.serving.http.live import MODEL, LiveServer, wait_for

ASK = b'{"model":"tiny","prompt":"a","max_tokens":1}'


def head(path: str = "/v1/completions", **headers: str) -> bytes:
    fields = {"Host": "x", "Content-Type": "application/json", **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode()


def exchange(server: LiveServer, data: bytes) -> tuple[int, bytes]:
    """Send bytes and read one response: status and body."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
        link.sendall(data)
        answer = HTTPResponse(link)
        answer.begin()
        return answer.status, answer.read()


@pytest.fixture(autouse=True)
def _server_survives(server: LiveServer) -> Iterator[None]:
    yield
    with server.client() as client:
        answer = client.post("/v1/completions", content=ASK, headers={"Content-Type": JSON})
    assert answer.status_code == 200
    assert server.process.poll() is None


JSON = "application/json"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"\x00\xff\x16\x03\x01 junk\r\n\r\n", 400, id="not http"),
        pytest.param(b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400, id="NUL in the target"),
        pytest.param(b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", 400, id="bytes in the target"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, id="no host"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\x00\r\n\r\n", 400, id="NUL header"),
        pytest.param(
            b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 17_000 + b"\r\n\r\n", 431, id="17 KB"
        ),
        pytest.param(b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, id="target"),
        pytest.param(b"GET / HTTP/1.1\r\nX: " + b"a" * 99_000, 400, id="endless header"),
        pytest.param(head(Content_Length="-1") + ASK, 400, id="negative length"),
        pytest.param(head(Content_Length="1e3") + ASK, 400, id="odd length"),
        pytest.param(head(Transfer_Encoding="gzip, chunked") + b"0\r\n\r\n", 400, id="encoding"),
        pytest.param(head(Transfer_Encoding="chunked") + b"ZZ\r\nab\r\n", 400, id="odd chunk size"),
        pytest.param(head(Content_Length="99999999999999") + ASK, 413, id="announced too large"),
        pytest.param(head("/v1/unknown", Content_Length="2") + b"{}", 404, id="unknown path"),
        pytest.param(
            b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405, id="method"
        ),
        pytest.param(
            head(Content_Length="2", Content_Encoding="gzip") + b"\x1f\x8b", 415, id="compressed"
        ),
        pytest.param(head(Content_Length="0", Connection="close"), 400, id="empty body"),
    ],
)
def test_junk_gets_a_short_refusal(server: LiveServer, data, status):
    given, body = exchange(server, data)
    assert given == status
    assert json.loads(body)["error"]["message"]
    for secret in (b"Traceback", b"/site-packages", b".py"):
        assert secret not in body


CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(ASK), ASK)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(head(Content_Length="4", Transfer_Encoding="chunked"), id="two lengths"),
        pytest.param(head(Transfer_Encoding="chunked", Content_Length="999"), id="the longer one"),
        pytest.param(head(Transfer_Encoding="Chunked", Content_Length="4"), id="upper case"),
        pytest.param(
            head(Transfer_Encoding="chunked").replace(b"HTTP/1.1", b"HTTP/1.0"), id="HTTP/1.0"
        ),
    ],
)
def test_a_body_of_two_lengths_is_refused_and_nothing_behind_it_is_read(server: LiveServer, data):
    """A proxy in front may believe the other length and take the rest for another's request."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
        link.sendall(data + CHUNKED + b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b"".join(iter(lambda: _recv(link), b""))
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_body_in_chunks_is_read(server: LiveServer):
    status, body = exchange(server, head(Transfer_Encoding="chunked") + CHUNKED)
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 1


def test_junk_behind_a_request_is_refused_after_its_answer(server: LiveServer):
    body = b'{"prompt":"a","max_tokens":480,"ignore_eos":true,"stream":true}'
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
        link.sendall(head(Content_Length=str(len(body))) + body)
        link.sendall(b"\x00\x01 junk\r\n\r\n" * 3)
        answer = b"".join(iter(lambda: _recv(link), b""))
    assert answer.index(b"data: [DONE]") < answer.index(b"invalid_http")
    assert "Traceback" not in server.log


def test_junk_in_a_body_that_nobody_reads_ends_the_connection(server: LiveServer):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b"200 OK" in link.recv(65536)
        link.sendall(b"junk\r\n")
        assert b"".join(iter(lambda: _recv(link), b"")) in (b"", b'{"status":"alive"}')
    assert "Traceback" not in server.log


def test_a_body_over_the_limit_is_refused_announced_or_not(server: LiveServer):
    body = b'{"prompt": "' + b"a" * (1 << 20) + b'"}'
    with server.client() as client:
        announced = client.post("/v1/completions", content=body, headers={"Content-Type": JSON})
        chunked = client.post(
            "/v1/completions", content=iter([body]), headers={"Content-Type": JSON}
        )
    for answer in (announced, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


def test_a_body_at_the_limit_is_read(server: LiveServer):
    frame = len(b'{"prompt": ""}')
    body = b'{"prompt": "' + b"a" * ((1 << 20) - frame) + b'"}'
    with server.client() as client:
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": JSON})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "prompt",
    ["\0", "a\0b", "\U0001f600", "\u202ereversed", "\x1b[2J", "\ufffe", "e" + "\u0301" * 500],
)
def test_odd_text_is_text(server: LiveServer, prompt):
    with server.client() as client:
        answer = client.post(
            "/v1/completions", json={"prompt": prompt, "max_tokens": 1, "stop": ["\0"]}
        )
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_prompts_and_odd_words_never_reach_the_log(server: LiveServer):
    canary = "canary-7f3a\r\n\x1b[31m"
    with server.client() as client:
        client.post("/v1/completions", json={"prompt": canary, "max_tokens": 1, "user": canary})
        client.post("/v1/completions", json={"prompt": canary, canary: 1})
        client.post("/v1/completions", json={"prompt": [canary, 1]})
        client.post("/v1/chat/completions", json={"messages": [{"role": canary, "content": "a"}]})
        client.get(f"/v1/models/{canary.encode().hex()}", headers={"X-Request-Id": "canary-7f3a;"})
    assert "canary" not in server.log
    assert "\x1b" not in server.log


def test_the_users_of_requests_do_not_become_metrics(server: LiveServer):
    def num_series() -> int:
        return httpx.get(f"{server.url}/metrics").text.count("\n")

    before = num_series()
    with server.client() as client:
        for user in range(20):
            client.post(
                "/v1/completions", json={"prompt": "a", "max_tokens": 1, "user": f"u{user}"}
            )
    assert num_series() == before


def test_idle_and_crawling_sockets_do_not_hold_others_up(server: LiveServer):
    links = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    try:
        for number, link in enumerate(links):
            link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: "[: 10 + number % 30])
        started = time.perf_counter()
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert time.perf_counter() - started < 1
    finally:
        for link in links:
            link.close()


def test_a_slow_reader_holds_nobody_up_and_still_gets_everything(server: LiveServer):
    request = {"prompt": "a", "max_tokens": 480, "ignore_eos": True, "temperature": 0}
    with server.client() as client:
        whole = client.post("/v1/completions", json={**request, "n": 8}).json()
    stream = {**request, "n": 8, "stream": True, "logprobs": 5}
    body = httpx.Request("POST", server.url, json=stream).content
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.connect(("127.0.0.1", server.port))
    with link:
        link.sendall(head(Content_Length=str(len(body)), Connection="close") + body)
        wait_for(lambda: server.metric("num_requests_running") > 0, 5)
        server.wait_until_idle(30)  # the engine did not wait for the reader
        with server.client() as client:
            assert client.post("/v1/completions", content=ASK, headers={"Content-Type": JSON})
        link.settimeout(10)
        answer = b"".join(iter(lambda: link.recv(1 << 20), b""))
    assert b"data: [DONE]" in answer
    assert answer.count(b'"finish_reason":"length"') == 8
    assert len(whole["choices"]) == 8


def test_random_bytes_never_break_it(server: LiveServer):
    rng = random.Random(0)
    seeds = [head(Content_Length=str(len(ASK)), Connection="close") + ASK]
    for _ in range(1500):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(data))
            data[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
            link.sendall(bytes(data))
            link.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: _recv(link), b""))
        assert not answer.startswith(b"HTTP/1.1 5")


def _recv(link: socket.socket) -> bytes:
    try:
        return link.recv(65536)
    except ConnectionResetError:
        return b""


def test_the_model_name_is_a_key_and_not_a_path(server: LiveServer):
    for name in ("../../etc/passwd", "http://127.0.0.1:1/x", f"{MODEL}\0", "tiny/../tiny"):
        with server.client() as client:
            answer = client.post("/v1/completions", json={"model": name, "prompt": "a"})
        assert answer.status_code == 404
        assert name not in answer.text
