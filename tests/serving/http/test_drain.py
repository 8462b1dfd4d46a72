"""Shutdown: requests in flight finish, and no new ones are admitted."""

from __future__ import annotations

import asyncio
import http.client
import signal
import socket
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from serving.http import uvicorn_server
from tests.serving.http.live import MODEL, LiveServer, running_server, wait_for

LONG = {
    "model": MODEL,
    "prompt": "a",
    "temperature": 0,
    "max_tokens": 480,
    "extra_body": {"ignore_eos": True},
}


def quick_server(target: Path, folder: Path, *more: str) -> AbstractContextManager[LiveServer]:
    """Without a neural drafter, whose step times take seconds to measure."""
    return running_server(target, folder, "drafter.kind=suffix", *more)


WHOLE = {"prompt": "a", "max_tokens": 480, "ignore_eos": True, "n": 8}
NAMED = {**LONG, "model": "org/tiny"}


def text_of(stream) -> str:
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_sigterm_lets_streams_finish(tiny_target_dir: Path, tmp_path: Path, num_processes: int):
    processes = f"server.processes={num_processes}"
    with quick_server(tiny_target_dir, tmp_path, processes) as server, server.openai() as client:
        whole = client.completions.create(**LONG).choices[0].text
        stream = iter(client.completions.create(**LONG, stream=True))
        first = next(stream).choices[0].text
        server.process.send_signal(signal.SIGTERM)

        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 5)
        alive = httpx.get(f"{server.url}/health").status_code
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**{**LONG, "max_tokens": 1})
        rest = text_of(stream)

        assert server.process.wait(timeout=20) == 0
        assert first + rest == whole
        assert alive == 200
        assert refused.value.status_code == 503
        assert refused.value.code == "draining"
        assert refused.value.response.headers["retry-after"] == "1"
        assert not (server.run_dir / "server.json").exists()
        assert "Traceback" not in server.log


def test_an_idle_connection_outlives_the_clients_own_limit(tiny_target_dir: Path, tmp_path: Path):
    with quick_server(tiny_target_dir, tmp_path) as server:
        host, port = server.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        for pause_s in (6.0, 0.0):  # clients keep theirs for 5 s
            connection.request("GET", "/health")
            assert connection.getresponse().read() is not None
            own = connection.sock
            time.sleep(pause_s)
            assert connection.sock is own is not None
        connection.close()


def test_requests_that_outlast_the_drain_are_told(tiny_target_dir: Path, tmp_path: Path):
    with (
        quick_server(tiny_target_dir, tmp_path, "server.drain_s=0.1") as server,
        server.openai() as client,
    ):
        endings: list[object] = []

        def ask_whole() -> None:
            try:
                client.completions.create(**LONG, n=8)
            except openai.APIStatusError as error:
                endings.append(error.status_code)

        stream = iter(client.completions.create(**LONG, n=8, stream=True))
        next(stream)
        asking = threading.Thread(target=ask_whole)
        asking.start()
        wait_for(lambda: server.metric("num_requests_waiting") > 0, 5)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            text_of(stream)
        asking.join(10)

        assert server.process.wait(timeout=10) == 0
        assert endings == [503]


def test_after_an_admin_drain_two_signals_stop_at_once(tiny_target_dir: Path, tmp_path: Path):
    """Whoever waits for an answer is told why there is none."""
    statuses: list[int] = []

    def ask_whole(server: LiveServer) -> None:
        with server.client() as own:
            statuses.append(own.post("/v1/completions", json=WHOLE).status_code)

    beside = "server.processes=1"
    with quick_server(tiny_target_dir, tmp_path, beside) as server, server.openai() as client:
        stream = iter(client.completions.create(**LONG, n=8, stream=True))
        next(stream)
        asking = threading.Thread(target=ask_whole, args=(server,))
        asking.start()
        wait_for(lambda: server.metric("num_requests_waiting") > 0, 5)
        with server.client() as admin:
            answer = admin.post("/admin/drain", json={})
            assert (answer.status_code, answer.json()["draining"]) == (200, True)
            assert admin.get("/ready").status_code == 503
            refused = admin.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert refused.status_code == 503
        assert next(stream).choices  # the process goes on
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: "a second signal" in server.log, 5)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            text_of(stream)
        assert server.process.wait(timeout=15) == 1
        asking.join(5)
        assert statuses == [503]
        assert "Traceback" not in server.log


def test_a_full_queue_is_answered_429_at_once(locked_server: LiveServer):
    """A batch of one and a queue of one: the third request must be retried."""
    with locked_server.openai() as client:
        streams = []
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(10):
                streams.append(client.completions.create(**NAMED, stream=True))
        started = time.perf_counter()
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**NAMED)
        assert time.perf_counter() - started < 1
        for stream in streams:
            stream.close()
        locked_server.wait_until_idle()

        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
        assert client.completions.create(**{**NAMED, "max_tokens": 1}).choices
        assert client.models.retrieve("org/tiny").id == "org/tiny"


def test_more_choices_than_the_queue_holds_can_never_run(locked_server: LiveServer):
    with locked_server.openai() as client:
        for fields, param in (({"n": 2}, "n"), ({"prompt": ["a", "b"]}, "prompt")):
            with pytest.raises(openai.BadRequestError, match="max_queue") as caught:
                client.completions.create(**NAMED | fields)
            assert caught.value.param == param


def test_the_server_listens_on_loopback_only(server: LiveServer):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # no packet is sent; it tells this machine's own address
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError):
        socket.create_connection((own, server.port), timeout=2)


def test_headers_that_never_end_are_cut_off(monkeypatch: pytest.MonkeyPatch):
    """On uvicorn's own loop, with shorter timeouts than a real server."""
    monkeypatch.setattr(uvicorn_server, "HEADER_S", 0.3)
    served: list[str] = []

    async def app(scope, receive, send):
        served.append(scope["path"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def scenario() -> tuple[float, float]:
        config = uvicorn.Config(
            app, http=uvicorn_server.GuardedProtocol, lifespan="off", port=0, timeout_keep_alive=1
        )
        server = uvicorn.Server(config)
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        port = server.servers[0].sockets[0].getsockname()[1]
        crawling = await until_closed(port, b"GET /a HTTP/1.1\r\nHost: x\r\n")
        silent = await until_closed(port, b"")
        second = await until_closed(port, b"GET /b HTTP/1.1\r\nHost: x\r\n\r\nGET /c")
        await server.shutdown()
        return crawling, max(silent, second)

    async def until_closed(port: int, data: bytes) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        started = time.perf_counter()
        writer.write(data)
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return time.perf_counter() - started

    crawling, longest = asyncio.run(scenario())
    assert 0.25 < crawling < 3
    assert longest < 4
    assert served == ["/b"]
