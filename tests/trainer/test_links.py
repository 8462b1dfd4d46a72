"""A process of a trainer learns that another one is gone, whatever it does at that time."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
import torch

from trainer.group import Group, Message, joined
from trainer.links import GroupError, Links, open_links
from trainer.processes import LOOPBACK, environment_of

CPU = torch.device("cpu")
SOON_S = 20.0
"""Far more than it takes, and far less than gloo would wait."""
Work = Callable[[Group], None]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A process that does this, killed in the end; its exit code is 3 for a ``GroupError``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            logging.disable(logging.CRITICAL)
            work()
            code = 0
        except GroupError:
            code = 3
        finally:
            os._exit(code)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def code_of(pid: int) -> int:
    """Exit code of a process that ends soon."""
    end_s = time.monotonic() + SOON_S
    while time.monotonic() < end_s:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    raise AssertionError("the process has not ended")


def among(rank: int, size: int, port: int, work: Work) -> None:
    os.environ |= LOOPBACK | environment_of(rank, size, port)
    with joined("cpu") as group:
        work(group)


@contextmanager
def first_of(size: int, work: Work, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Processes 1 to ``size - 1``, which do this; this one is to be process 0."""
    port = free_port()
    for name, value in (LOOPBACK | environment_of(0, size, port)).items():
        monkeypatch.setenv(name, value)
    with ExitStack() as stack:
        yield [
            stack.enter_context(forked(lambda rank=rank: among(rank, size, port, work)))  # type: ignore[misc]
            for rank in range(1, size)
        ]


def follow(group: Group) -> None:
    """What a worker does: take what is sent, and add up."""
    while (message := group.receive(CPU)).do != "end":
        assert torch.equal(message.tensors["numbers"], torch.arange(float(message.values["num"])))
        group.add_up(torch.ones(1000))


def exchange(group: Group, num: int) -> None:
    message = Message("add", {"num": num}, {"numbers": torch.arange(float(num))})
    group.tell_all(message)
    total = torch.ones(1000)
    group.add_up(total)
    assert torch.equal(total, torch.full((1000,), float(group.size)))


@pytest.mark.parametrize("num", [10, 1_000_000])
@pytest.mark.parametrize("turn", range(3))
def test_a_process_killed_in_an_exchange_ends_the_others_soon(
    num: int, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment_s = random.Random(f"{num} {turn}").uniform(0, 0.05)
    with first_of(3, follow, monkeypatch) as (killed, other):
        why = rf"process 1 \(pid {killed} on .*\) .* is gone"
        with pytest.raises(GroupError, match=why), joined("cpu") as group:
            exchange(group, num)
            began_s = time.monotonic()
            threading.Timer(moment_s, os.kill, (killed, signal.SIGKILL)).start()
            while time.monotonic() < began_s + SOON_S:
                exchange(group, num)
        assert code_of(killed) == -signal.SIGKILL
        assert code_of(other) == 3


def test_workers_end_when_the_first_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lead(group: Group) -> None:
        while True:
            exchange(group, 1000)

    port = free_port()
    for name, value in (LOOPBACK | environment_of(1, 2, port)).items():
        monkeypatch.setenv(name, value)
    with forked(lambda: among(0, 2, port, lead)) as first:
        why = rf"process 0 \(pid {first} on .*\) .* is gone"
        with pytest.raises(GroupError, match=why), joined("cpu") as group:
            threading.Timer(0.05, os.kill, (first, signal.SIGKILL)).start()
            follow(group)


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(group: Group) -> None:
        group.receive(CPU)
        raise MemoryError("no room\nfor rows")

    with first_of(2, fail, monkeypatch) as (failing,):
        why = rf"process 1 \(pid {failing} on .*\) ended with MemoryError: no room for rows; ending"
        with pytest.raises(GroupError, match=why), joined("cpu") as group:
            while True:
                exchange(group, 10)


def test_a_process_that_waits_for_nothing_is_told_when_it_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        first_of(2, follow, monkeypatch) as (killed,),
        pytest.raises(GroupError, match="process 1"),
        joined("cpu") as group,
    ):
        exchange(group, 10)
        group.check()
        os.kill(killed, signal.SIGKILL)
        assert group.links is not None and group.links.why(SOON_S) is not None
        group.check()


def test_a_suspended_process_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    with first_of(2, follow, monkeypatch) as (other,):
        with joined("cpu") as group:
            exchange(group, 10)
            os.kill(other, signal.SIGSTOP)
            assert group.links is not None and group.links.why(0.5) is None
            threading.Timer(0.2, os.kill, (other, signal.SIGCONT)).start()
            exchange(group, 1_000_000)  # more than fits into the connection
            group.tell_all(Message("end", {}, {}))
        assert code_of(other) == 0


def test_a_process_that_nothing_wakes_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    """The main thread waits for what never comes, as in a library that does not notice."""

    def be_stuck() -> None:
        logging.disable(logging.NOTSET)
        logging.basicConfig(stream=sys.stderr, force=True)
        links = open_links(0, 2, "127.0.0.1", board, grace_s=0.2)
        assert links.peers
        threading.Event().wait()

    board = PipeBoard()
    with forked(be_stuck) as stuck:
        open_links(1, 2, "127.0.0.1", board).close()
        assert code_of(stuck) == 1
    said = capfd.readouterr().err
    assert "process 1 (pid" in said and "has not ended within 0.2 s and is killed" in said


def test_strangers_are_not_taken_for_processes() -> None:
    board, found = PipeBoard(), list[Links]()
    accepting = threading.Thread(target=lambda: found.append(open_links(0, 2, "127.0.0.1", board)))
    accepting.start()
    about = board.get("any")
    board.set("any", about.decode())
    port = int(about.split(b'"port": ')[1].split(b",")[0])
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"\x10\0\0\0" + b'{"rank": 1}     ', b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(text)
    worker = open_links(1, 2, "127.0.0.1", board)
    accepting.join()

    worker.send(0, [b"hello"])
    place = bytearray(5)
    found[0].receive(1, memoryview(place))
    assert place == b"hello"
    worker.close()
    assert found[0].why(SOON_S) is not None
    found[0].close()


class PipeBoard:
    """A board for one reader, which may be in another process."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def set(self, key: str, value: str) -> None:
        os.write(self._write, value.encode())

    def get(self, key: str) -> bytes:
        return os.read(self._read, 4096)
