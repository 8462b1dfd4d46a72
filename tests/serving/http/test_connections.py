"""A server that is out of file descriptors, or nearly."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from oracles.forked import run_forked
from serving.http.connections import ACCEPTS, is_near_limit
from serving.http.port import BACKLOG, bind
from tests.serving.http.live import LiveServer, environment, wait_for
from tests.serving.http.test_port import settings

ROOM = 40
"""Files that a limited process may open beside those it has."""


def num_open(server: LiveServer) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


@contextmanager
def limited(server: LiveServer) -> Iterator[None]:
    """Let the server's process open ``ROOM`` files more than it has."""
    pid, kind = server.process.pid, resource.RLIMIT_NOFILE
    former = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (num_open(server) + ROOM, former[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, former)


def ends(link: socket.socket) -> bytes:
    """What the server sends until it closes."""
    return b"".join(iter(lambda: link.recv(65536), b""))


def test_connections_near_the_limit_are_refused_and_the_log_stays_short(locked_server: LiveServer):
    log_before, before = len(locked_server.log), num_open(locked_server)
    with limited(locked_server), ExitStack() as stack:
        links = []
        for _ in range(3 * ROOM):
            links.append(socket.create_connection(("127.0.0.1", locked_server.port), timeout=10))
            stack.enter_context(links[-1])
        refused = ends(links[-1])
        assert refused.startswith(b"HTTP/1.1 503 Service Unavailable")
        assert b"too_many_connections" in refused and b"Retry-After: 1" in refused
        links[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert ends(links[0]).startswith(b"HTTP/1.1 200 OK")
        assert num_open(locked_server) < before + ROOM
    wait_for(lambda: num_open(locked_server) <= before + 1, 10)
    assert httpx.get(f"{locked_server.url}/health").status_code == 200
    assert "Traceback" not in locked_server.log[log_before:]
    assert len(locked_server.log) < log_before + 4_000


@pytest.mark.parametrize(
    ("soft", "highest"), [(64, 47), (80, 63), (256, 223), (512, 447), (1024, 959), (65_536, 65_471)]
)
def test_a_part_of_the_descriptors_is_left_to_files(monkeypatch, soft, highest):
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (soft, soft))
    assert not is_near_limit(highest)
    assert is_near_limit(highest + 1)


def test_without_a_limit_nothing_is_near_it(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (resource.RLIM_INFINITY,) * 2)
    assert not is_near_limit(1 << 30)


def test_the_limit_is_raised_as_far_as_it_may(tmp_path):
    code = (
        "import resource\n"
        "from serving.http.connections import raise_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 700))\n"
        "raise_limit(); print(*resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (0, 700))\n"
        "raise_limit(); print(*resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    done = run_forked(["-c", code], environment(), tmp_path, 30)
    assert done.stdout.split() == ["700", "700"] * 2


def test_the_queue_of_connections_stays_long_however_few_are_accepted_at_once(tmp_path):
    with bind(settings(tmp_path, 0)) as bound, ExitStack() as stack:
        bound.listen(1)
        for _ in range(8 * ACCEPTS):  # with a queue of one, the third would wait
            link = stack.enter_context(socket.socket())
            link.settimeout(5)
            link.connect(bound.getsockname())
    assert BACKLOG > 8 * ACCEPTS
