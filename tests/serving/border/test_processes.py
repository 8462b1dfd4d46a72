"""What becomes of clients, pages and the port when a process of the server dies."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from configs.load import load_settings
from serving.border import processes as border_processes
from serving.border import server as border_server
from serving.border.engine_side import welcome_for
from serving.border.in_process import Desk
from serving.border.processes import MOST_DEATHS, HttpProcesses, Spawned, Spawner
from serving.border.server import num_processes, serve_http
from serving.http.loading import LOADING, answering_503
from serving.http.port import bind
from tests.serving.border.conftest import settings_of
from tests.serving.http.live import MODEL, LiveServer, running_server, wait_for

QUICK = ("drafter.kind=suffix", "policy.kind=fixed", "policy.drafter=suffix")
LONG = {
    "model": MODEL,
    "prompt": "a",
    "temperature": 0,
    "max_tokens": 480,
    "stream": True,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def pair(tiny_target_dir: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """A server with two HTTP processes."""
    with running_server(tiny_target_dir, tmp_path, "server.processes=2", *QUICK) as server:
        wait_for(lambda: len(children(server)) == 2, 60)
        yield server


def children(server: LiveServer) -> list[int]:
    """HTTP processes of a server."""
    return children_of(server.process.pid)


def children_of(pid: int) -> list[int]:
    """HTTP processes that a process has started."""
    path = Path(f"/proc/{pid}/task")
    pids = [int(x) for task in path.iterdir() for x in (task / "children").read_text().split()]
    return sorted(x for x in pids if b"serving.border" in Path(f"/proc/{x}/cmdline").read_bytes())


def lives(pid: int) -> bool:
    """It is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def answers(url: str) -> bool:
    """Whether a server answers with 200."""
    try:
        return httpx.get(url, timeout=1.0).status_code == 200
    except httpx.HTTPError:
        return False


def files_of(pid: int) -> set[str]:
    """What its descriptors stand for."""
    found: set[str] = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(file))
    return found


def owner_of(connection: socket.socket, pids: list[int]) -> int:
    """The process that has accepted a connection."""
    (port,) = connection.getsockname()[1:2]
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    (inode,) = {x[9] for x in fields if int(x[2].rpartition(":")[2], 16) == port and x[9] != "0"}
    for pid in pids:
        if f"socket:[{inode}]" in files_of(pid):
            return pid
    raise AssertionError("nobody has accepted it")


class Stream:
    """A streamed completion over a connection of its own."""

    def __init__(self, server: LiveServer) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {**LONG, "ignore_eos": True}
        del body["extra_body"]
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/completions", json.dumps(body), headers)
        self.socket = self._connection.sock
        self._response = self._connection.getresponse()
        assert self._response.status == 200
        self.first = self._event()

    def rest(self) -> list[str]:
        """This event and those that follow, until the stream ends in any way."""
        events = [self.first]
        with contextlib.suppress(http.client.HTTPException, OSError):
            while event := self._event():
                events.append(event)
        self._response.close()
        self._connection.close()
        return events

    def _event(self) -> str:
        line = self._response.readline()
        self._response.readline()
        return line.decode().strip()


def test_an_http_process_that_is_killed_costs_its_own_clients_only(pair: LiveServer):
    before = children(pair)
    for pid in before:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        os.kill(pid, signal.SIGTERM)  # a service manager sends it to every process of a server
        os.kill(pid, signal.SIGINT)  # and a terminal this one
    streams = [Stream(pair) for _ in range(6)]
    owners = [owner_of(stream.socket, before) for stream in streams]
    victim = owners[0]
    finished = pair.metric("e2e_request_latency_seconds_count")
    os.kill(victim, signal.SIGKILL)
    endings = [stream.rest()[-1] for stream in streams]

    for owner, ending in zip(owners, endings, strict=True):
        assert (ending == "data: [DONE]") == (owner != victim)
    pair.wait_until_idle(60)
    wait_for(lambda: pair.metric("kv_cache_usage_perc") == 0, 60)
    wait_for(lambda: len(children(pair)) == 2 and victim not in children(pair), 60)
    assert set(before) - {victim} < set(children(pair))
    with pair.openai() as client:
        for _ in range(8):
            assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices
    assert pair.metric("request_success_total", finished_reason="cancelled") == owners.count(victim)
    pids = children(pair)
    num_ended = owners.count(victim)
    num_counted = finished + 8 + len(streams) - num_ended
    assert pair.metric("e2e_request_latency_seconds_count") == num_counted
    assert re.search(f"HTTP process {victim} was ended by SIGKILL", pair.log)
    assert pair.stop() == 0
    assert not any(map(lives, pids))
    assert "Traceback" not in pair.log and "CRITICAL" not in pair.log


def test_when_the_engines_process_is_killed_streams_are_told_and_the_port_is_free(
    pair: LiveServer,
):
    pids = children(pair)
    stream = Stream(pair)
    pair.process.kill()
    *_, last = stream.rest()

    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_gone"
    wait_for(lambda: not any(map(lives, pids)), 60)
    assert "CRITICAL serving.border: the engine's process is gone" in pair.log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{pair.url}/health")
    again = socket.socket()
    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with again:
        again.bind(("127.0.0.1", pair.port))
        again.listen()


def test_a_server_that_is_killed_while_it_loads_leaves_nobody_at_its_port():
    """HTTP processes that import cannot see that it has gone; here one is even stopped."""
    loading = (
        "import time; from configs.load import load_settings; from serving.http.port import bind; "
        "from serving.border.processes import Spawner; "
        "held = bind(load_settings((), ('server.port=0',), {})); "
        "spawner = Spawner(1, held); print(held.getsockname()[1], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", loading], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            wait_for(lambda: children_of(server.pid), 60)
            (importing,) = children_of(server.pid)
            maps = Path(f"/proc/{importing}/maps")
            wait_for(lambda: "pydantic_core" in maps.read_text(), 60)
            os.kill(importing, signal.SIGSTOP)
        finally:
            server.kill()
    wait_for(lambda: not lives(importing), 10)
    bind(load_settings((), (f"server.port={port}",), {})).close()


def test_a_process_that_hangs_holds_up_no_other_and_leaves_nothing(pair: LiveServer):
    """Stopped in the middle of its streams, it reads nothing more until it is killed."""
    streams = [Stream(pair) for _ in range(4)]
    pids = children(pair)
    owner = owner_of(streams[0].socket, pids)
    os.kill(owner, signal.SIGSTOP)
    stopped = [stream for stream in streams if owner_of(stream.socket, pids) == owner]
    others = [stream for stream in streams if stream not in stopped]
    assert all(stream.rest()[-1] == "data: [DONE]" for stream in others)
    os.kill(owner, signal.SIGKILL)
    assert all(stream.rest()[-1] != "data: [DONE]" for stream in stopped)
    wait_for(lambda: len(children(pair)) == 2 and owner not in children(pair), 60)
    wait_for(lambda: pair.metric("kv_cache_usage_perc") == 0, 60)


@pytest.fixture
def listener(tiny_target_dir: Path, tmp_path: Path) -> Iterator[socket.socket]:
    with bind(settings_of(tiny_target_dir, tmp_path)) as bound:
        yield bound


def test_a_server_whose_http_processes_cannot_start_gives_up(
    new_service, listener, tiny_target_dir: Path, tmp_path: Path, monkeypatch, caplog
):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    settings = settings_of(tiny_target_dir, tmp_path)
    service = new_service()
    spawner = Spawner(1, listener)
    assert serve_http(service, settings, listener, tiny_target_dir, spawner) == 1
    spawner.close()
    assert f"{MOST_DEATHS} HTTP processes in a row died" in caplog.text


class OneBroken(Spawner):
    """The first process of its second row lives until it is killed, and those after it die at once,
    as after an update of the package."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(2, listener)
        self.starts_s: list[float] = []
        self.sound, self._others = subprocess.Popen(["sleep", "600"]), list[socket.socket]()

    def spawn(self, row: int) -> Spawned:
        if row == 0:
            return super().spawn(row)
        process = subprocess.Popen(["false"]) if self.starts_s else self.sound
        self.starts_s.append(time.monotonic())
        own, other = socket.socketpair()
        self._others.append(other)
        return Spawned(process, own)

    def close(self) -> None:
        super().close()
        for other in self._others:
            other.close()


def test_a_process_that_dies_at_once_beside_a_sound_one_is_started_ever_more_rarely(
    new_service, listener, tiny_target_dir: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(border_processes, "_LIVED_S", 0.0)
    settings = settings_of(tiny_target_dir, tmp_path)
    desk, spawner = Desk(new_service()), OneBroken(listener)
    processes = HttpProcesses(spawner, desk, welcome_for(desk, settings, tiny_target_dir))

    def ticks(is_done: Callable[[], bool]) -> None:
        wait_for(lambda: processes.tick() is not None or is_done(), 60)

    try:
        ticks(lambda: processes.is_ready)
        spawner.sound.kill()
        ticks(lambda: len(spawner.starts_s) == 4)
    finally:
        processes.close(0.0, lambda: True)
        spawner.close()
    assert spawner.starts_s[3] - spawner.starts_s[2] >= 0.4


def test_an_engine_that_cannot_go_on_ends_the_server_with_an_exit_code(
    new_service, listener, tiny_target_dir: Path, tmp_path: Path, monkeypatch, caplog
):
    settings = settings_of(tiny_target_dir, tmp_path)
    service = new_service()
    port = listener.getsockname()[1]
    endings: list[object] = []

    def lost() -> bool:
        raise RuntimeError("device is lost")

    def ask() -> None:
        url = f"http://127.0.0.1:{port}/v1"
        wait_for(lambda: httpx.get(url.replace("/v1", "/ready")).status_code == 200, 60)
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            stream = iter(client.completions.create(**LONG | {"max_tokens": 200}))
            next(stream)
            monkeypatch.setattr(service.engine, "_fail_all", lost)
            monkeypatch.setattr(service.engine, "step", lost)
            try:
                endings.extend(stream)
            except openai.APIError as error:
                endings.append(error.code)

    asking = threading.Thread(target=ask)
    asking.start()
    spawner = Spawner(1, listener)
    assert serve_http(service, settings, listener, tiny_target_dir, spawner) == 1
    spawner.close()
    asking.join(60)
    assert endings[-1] == "engine_gone"
    assert "the engine cannot go on: the server ends" in caplog.text


def test_it_is_not_ready_while_anybody_is_told_that_the_model_loads(
    new_service, listener, tiny_target_dir: Path, tmp_path: Path, monkeypatch
):
    """For a moment, an HTTP process and the loading server accept connections side by side."""
    settings = settings_of(tiny_target_dir, tmp_path)
    service = new_service()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/ready"
    meanwhile: list[str] = []

    @contextlib.contextmanager
    def still_answering(held: socket.socket) -> Iterator[None]:
        with answering_503(held):
            yield  # until the HTTP process accepts connections
            meanwhile.extend(httpx.get(url).text for _ in range(20))

    def end_once_ready() -> None:
        try:
            wait_for(lambda: answers(url), 60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(border_server, "answering_503", still_answering)
    ending = threading.Thread(target=end_once_ready)
    ending.start()
    spawner = Spawner(1, listener)
    assert serve_http(service, settings, listener, tiny_target_dir, spawner) == 0
    spawner.close()
    ending.join(60)
    assert [json.loads(said)["reason"] for said in meanwhile] == [LOADING] * 20


def test_a_stopped_process_is_replaced_and_does_not_hold_up_the_end(
    new_service, listener, tiny_target_dir: Path, tmp_path: Path, monkeypatch, caplog
):
    monkeypatch.setattr(border_processes, "SILENT_S", 3.0)
    settings = settings_of(tiny_target_dir, tmp_path)
    service = new_service()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    own, stopped = os.getpid(), list[int]()

    def stop_both() -> None:
        try:
            for _ in range(2):
                wait_for(lambda: set(children_of(own)) - set(stopped), 60)
                wait_for(lambda: answers(f"{url}/ready"), 60)
                stopped.extend(set(children_of(own)) - set(stopped))
                os.kill(stopped[-1], signal.SIGSTOP)
        finally:
            os.kill(own, signal.SIGTERM)

    stopping = threading.Thread(target=stop_both)
    stopping.start()
    spawner = Spawner(1, listener)
    assert serve_http(service, settings, listener, tiny_target_dir, spawner) == 0
    spawner.close()
    stopping.join(60)
    assert len(stopped) == 2 and not any(map(lives, stopped))
    assert f"HTTP process {stopped[0]} was ended by SIGKILL (it was not heard of" in caplog.text


@pytest.mark.parametrize(
    ("processes", "on_gpu", "cores", "wanted"),
    [(None, False, 64, 0), (None, True, 2, 1), (None, True, 8, 2), (None, True, 128, 2),
     (0, True, 8, 0), (3, False, 2, 3)],
)  # fmt: skip
def test_the_number_of_processes_follows_the_setting_or_the_device(
    tiny_target_dir, tmp_path, monkeypatch, processes, on_gpu, cores, wanted
):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    settings = settings_of(tiny_target_dir, tmp_path)
    server = settings.server.model_copy(update={"processes": processes})
    engine = settings.engine.model_copy(update={"max_batch": 128})
    settings = settings.model_copy(update={"server": server, "engine": engine})
    assert border_server.num_processes(settings, on_gpu) == wanted


@pytest.mark.parametrize(
    ("max_batch", "cores", "wanted"),
    [
        (16, 64, 1),
        (32, 64, 1),
        (33, 64, 2),
        (128, 16, 2),
        (128, 7, 1),
        (128, 2, 1),
        (192, 64, 3),
        (192, 8, 2),
        (512, 64, 4),
    ],
)
def test_a_gpu_has_http_processes_for_its_batch_as_its_cores_allow(max_batch, cores, wanted):
    settings = load_settings((), (f"engine.max_batch={max_batch}",), {})

    assert num_processes(settings, on_gpu=True, cores=cores) == wanted
    assert num_processes(settings, on_gpu=False, cores=cores) == 0


def test_while_a_server_runs_threads_give_up_the_gil_sooner():
    own_s = sys.getswitchinterval()
    sys.setswitchinterval(0.005)  # a trainer of a test before may have shortened its turns, too
    try:
        with border_server._short_turns():
            assert sys.getswitchinterval() < 0.005
        assert sys.getswitchinterval() == 0.005
    finally:
        sys.setswitchinterval(own_s)


def test_as_many_http_processes_as_the_settings_say():
    settings = load_settings((), ("server.processes=7",), {})

    assert num_processes(settings, on_gpu=True, cores=2) == 7
