"""The port is taken before anything is loaded, and whoever connects meanwhile is told so."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from configs.schema import ServerSettings, Settings
from oracles.forked import Forked
from serving.http.loading import answering_503
from serving.http.port import bind
from tests.serving.http.live import SETTINGS, environment, launch_command, wait_for


def settings(folder: Path, port: int, host: str = "127.0.0.1") -> Settings:
    return Settings(run_dir=folder, server=ServerSettings(host=host, port=port, api_key="k"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def launch(folder: Path, name: str, *more: str) -> Forked:
    wanted = [x for x in SETTINGS if not x.startswith("server.port")]
    command = launch_command(*wanted, f"run_dir={folder}", "drafter.kind=none", *more)
    return Forked(command[1:], environment(), Path.cwd(), folder / f"{name}.txt")


def test_a_second_server_fails_at_once_and_the_first_one_is_not_disturbed(
    tiny_target_dir: Path, tmp_path: Path
):
    port = free_port()
    same = (f"target={tiny_target_dir}", f"server.port={port}")
    first = launch(tmp_path, "first", *same)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _answers(url), 30)  # it is loading
        second = launch(tmp_path, "second", *same)
        wait_for(lambda: (tmp_path / "server.json").exists(), 60)
        record = (tmp_path / "server.json").read_text()
        third = launch(tmp_path, "third", *same)
        assert second.wait(30) == third.wait(30) == 1
        for name in ("second", "third"):
            said = (tmp_path / f"{name}.txt").read_text().splitlines()
            assert [line for line in said if " INFO " not in line] == [
                f"cannot bind server.host 127.0.0.1 and server.port {port}: Address already in "
                f"use; stop the process that listens there, or choose another port (0 for a free "
                f"one)"
            ]
        assert httpx.get(f"{url}/ready").status_code == 200
        assert (tmp_path / "server.json").read_text() == record
        assert json.loads(record)["pid"] == first.pid
    finally:
        first.kill()
        first.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code in (200, 503)
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "0.0.0.0"),
        ("0.0.0.0", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
    ],
)
def test_a_port_that_is_bound_is_held(tmp_path: Path, first: str, second: str):
    with bind(settings(tmp_path, 0, first)) as held:
        port = held.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot bind server.host {second}.*port {port}"):
            bind(settings(tmp_path, port, second))
    bind(settings(tmp_path, port, second)).close()


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_an_address_of_another_machine_is_told_from_a_port_in_use(tmp_path: Path, host: str):
    with pytest.raises(OSError, match=f"cannot bind server.host {host} ") as caught:
        bind(settings(tmp_path, 0, host))
    assert "must be an address of this machine" in str(caught.value)
    assert "stop the process" not in str(caught.value)


def test_of_many_servers_at_the_same_moment_one_gets_the_port(tmp_path: Path):
    port = free_port()

    def try_it(_: int) -> socket.socket | None:
        try:
            return bind(settings(tmp_path, port))
        except OSError:
            return None

    with ThreadPoolExecutor(8) as pool:
        bound = [held for held in pool.map(try_it, range(8)) if held is not None]
    assert len(bound) == 1
    bound[0].close()


def test_a_port_with_connections_of_a_dead_server_is_free(tmp_path: Path):
    held = bind(settings(tmp_path, 0))
    port = held.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _ = held.accept()
        accepted.close()  # first, so that the server's side waits in TIME_WAIT
        held.close()
        assert client.recv(1) == b""
    bind(settings(tmp_path, port)).close()


def test_while_the_model_loads_every_request_is_answered_at_once(tmp_path: Path):
    held = bind(settings(tmp_path, 0))
    url = f"http://127.0.0.1:{held.getsockname()[1]}"
    with answering_503(held), socket.create_connection(held.getsockname()) as slow:
        slow.sendall(b"GET /never-ending")
        began = time.monotonic()
        ready, health = httpx.get(f"{url}/ready"), httpx.get(f"{url}/health?x=1")
        large = httpx.post(f"{url}/v1/completions", content=b"x" * (1 << 20))
        with socket.create_connection(held.getsockname()) as odd:
            odd.sendall(b"\r\n\r\n")
            odd.shutdown(socket.SHUT_WR)
            assert odd.recv(4096).startswith(b"HTTP/1.1 503 ")
        assert time.monotonic() - began < 3
    assert large.json()["error"]["code"] == "loading"
    assert ready.json() == {"status": "not ready", "reason": "the model is being loaded"}
    for answer in (ready, large):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
    assert (health.status_code, health.json()) == (200, {"status": "alive"})
    held.close()


def test_who_connects_when_loading_ends_is_answered_by_the_server(tmp_path: Path):
    held = bind(settings(tmp_path, 0))
    with answering_503(held):
        pass
    asking = http.client.HTTPConnection(*held.getsockname(), timeout=5)
    asking.request("GET", "/ready")  # the kernel accepts it; nobody has taken it yet

    def serve_one() -> None:
        held.settimeout(5)
        accepted, _ = held.accept()
        with accepted:
            accepted.recv(4096)
            accepted.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    thread = threading.Thread(target=serve_one)
    thread.start()
    assert asking.getresponse().status == 204
    thread.join()
    asking.close()
    held.close()


def test_who_was_accepted_when_loading_ends_is_answered_all_the_same(tmp_path: Path, caplog):
    held = bind(settings(tmp_path, 0))
    held.setblocking(False)
    clients = []
    for _ in range(20):
        with answering_503(held):
            clients += [socket.create_connection(held.getsockname()) for _ in range(5)]
            for client in clients[-5:]:
                client.sendall(b"GET /ready HTTP/1.1\r\n\r\n")
                client.shutdown(socket.SHUT_WR)
    accepted = []
    with pytest.raises(BlockingIOError):
        while True:
            accepted.append(held.accept()[0])
    for left in accepted:
        left.sendall(b"HTTP/1.1 503 ")  # nobody had taken it
        left.close()
    for client in clients:
        with client:
            assert client.recv(4096).startswith(b"HTTP/1.1 503 ")
    assert not caplog.records
    held.close()


def test_a_client_that_sends_nothing_does_not_delay_the_end_of_loading(tmp_path: Path):
    held = bind(settings(tmp_path, 0))
    with answering_503(held):
        silent = socket.create_connection(held.getsockname())
        time.sleep(0.1)  # time to be accepted
    silent.settimeout(5)
    assert silent.recv(1) == b""
    silent.close()
    held.close()
