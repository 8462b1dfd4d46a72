"""Connections between process 0 of a trainer and each of the others: messages, and who is gone.

There are two to each process. One carries messages. The other is silent until a process ends: the
system closes it with the process, and since it is idle, keep-alive probes find out within half a
minute that a host has vanished. A process that computes for long or is suspended is not taken for
dead, because the system answers for it.

Gloo and NCCL alone do not suffice. Gloo has waited for a killed process for as long as it may, and
NCCL does not see that a process of the same host has died.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import select
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

log = logging.getLogger(__name__)

GRACE_S = 30.0
"""Time that a process has to end by itself after another one is gone. Then it is ended: it may wait
for the other one where nothing can wake it."""
_CONNECT_S = 120.0
"""For which processes that have met wait for each other's connections."""
_HELLO_S = 10.0
_MOST_BYTES = 4096
"""Of what a process says when it connects or ends."""
_MOST_REASON = 500
_KEY = "slipstream/links"
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Seconds of silence before the first probe, seconds between probes, and unanswered ones after
which a connection is broken."""


class GroupError(RuntimeError):
    """Another process of the trainer is gone."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; ending. Nothing acknowledged is lost: started again, the trainer resumes "
            f"from its last checkpoint"
        )


class Board(Protocol):
    """Where process 0 leaves word for the others, such as a ``TCPStore``."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        """Waits until somebody has set it."""
        ...


@dataclass(slots=True, eq=False)
class Peer:
    """Another process, seen from this one."""

    rank: int
    pid: int
    host: str
    talk: socket.socket
    """For messages."""
    watch: socket.socket
    """For what is said at the end."""
    said: bytes = b""
    """Of that, what has arrived and is not a whole line yet."""

    @property
    def name(self) -> str:
        return _name_of(self.rank, self.pid, self.host)


@dataclass(slots=True, eq=False)
class Links:
    """Connections of this process: those of process 0 to all others, those of others to it."""

    rank: int
    peers: Mapping[int, Peer]
    """By rank."""
    grace_s: float = GRACE_S
    gone: str | None = None
    """The first process that went, and why."""
    _is_known: threading.Event = field(default_factory=threading.Event)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _wake: tuple[int, int] = field(default_factory=os.pipe)
    """The thread ends when the second one is closed."""
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch the others."""
        self._thread = threading.Thread(target=self._watch, name="processes", daemon=True)
        self._thread.start()

    def send(self, rank: int, parts: Iterable[bytes | memoryview]) -> None:
        """Send bytes to another process.

        Raises:
            GroupError: a process is gone.
        """
        try:
            for part in parts:
                self.peers[rank].talk.sendall(part)
        except OSError:
            raise self._lost(rank) from None

    def receive(self, rank: int, place: memoryview) -> None:
        """Fill ``place`` with the next bytes of another process.

        Raises:
            GroupError: a process is gone.
        """
        try:
            _read(self.peers[rank].talk, place)
        except OSError:
            raise self._lost(rank) from None

    def why(self, wait_s: float = 0.0) -> str | None:
        """Which process is gone, and why; ``None``: none is, as far as is known.

        Args:
            wait_s: time for which to wait for such news.
        """
        self._is_known.wait(wait_s)
        return self.gone

    def leave(self, error: BaseException | None = None) -> None:
        """Tell the others that this process ends.

        Args:
            error: what it dies of; ``None``: it has done its work.
        """
        note: dict[str, Any] = {"left": True}
        if error is not None:
            cause = error if str(error) else error.__cause__ or error
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:_MOST_REASON]
            own = _name_of(self.rank, os.getpid(), socket.gethostname())
            note = {"gone": f"{own} ended with {reason}"}
            threading.Thread(target=self._end_in_time, name="ending", daemon=True).start()
        self._tell(note)

    def close(self) -> None:
        """Close all connections. Others that were not told take this process for dead."""
        if self._is_over.is_set():
            return
        self._is_over.set()
        os.close(self._wake[1])
        if self._thread is not None:
            self._thread.join()
        os.close(self._wake[0])
        for peer in self.peers.values():
            peer.talk.close()
            peer.watch.close()

    def _lost(self, rank: int) -> GroupError:
        """What to raise when the connection to a process is closed."""
        closed = f"{self.peers[rank].name} of this trainer has closed its connection"
        return GroupError(self.why(wait_s=2.0) or closed)

    def _tell(self, note: Mapping[str, Any]) -> None:
        line = json.dumps(note).encode() + b"\n"
        for peer in self.peers.values():
            with contextlib.suppress(OSError):  # it is gone
                peer.watch.sendall(line)

    def _watch(self) -> None:
        waiting, by_descriptor = select.poll(), {p.watch.fileno(): p for p in self.peers.values()}
        for descriptor in (*by_descriptor, self._wake[0]):
            waiting.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in waiting.poll():
                if descriptor == self._wake[0]:
                    return
                note = _note_from(by_descriptor[descriptor])
                if note is None:
                    continue
                waiting.unregister(descriptor)
                if "gone" in note:
                    self._learn(note["gone"])

    def _learn(self, gone: str) -> None:
        """Another process is gone: wake this one, and pass the news on."""
        if self.gone is not None:
            return
        self.gone = gone
        self._is_known.set()
        log.warning("%s", gone)
        if self.rank == 0:
            self._tell({"gone": gone})
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                peer.talk.shutdown(socket.SHUT_RDWR)
        threading.Thread(target=self._end_in_time, name="ending", daemon=True).start()

    def _end_in_time(self) -> None:
        """End this process if it does not do so by itself."""
        if not self._is_over.wait(self.grace_s):
            why = self.gone or "it failed"
            log.critical(
                "%s; this process has not ended within %g s and is killed. Nothing acknowledged is "
                "lost: started again, the trainer resumes from its last checkpoint",
                why, self.grace_s,
            )  # fmt: skip
            logging.shutdown()
            os._exit(1)


def open_links(rank: int, size: int, address: str, board: Board, grace_s: float = GRACE_S) -> Links:
    """Connect process 0 with all others, which call this at about the same time.

    Args:
        address: of process 0's host.
        board: see ``Board``.

    Raises:
        GroupError: one did not come.
    """
    try:
        peers = _accepted(size, address, board) if rank == 0 else _connected(rank, address, board)
    except OSError as error:
        raise GroupError(f"the processes of this trainer do not reach each other ({error})") from (
            error
        )
    links = Links(rank, peers, grace_s)
    links.start()
    return links


def _accepted(size: int, address: str, board: Board) -> dict[int, Peer]:
    token = secrets.token_hex(16)
    found: dict[tuple[int, str], tuple[dict[str, Any], socket.socket]] = {}
    with _listening(address) as listener:
        listener.settimeout(_CONNECT_S)
        about = {"port": listener.getsockname()[1], "token": token, **_about_us()}
        board.set(_KEY, json.dumps(about))
        while len(found) < 2 * (size - 1):
            connection, _ = listener.accept()
            hello = _hello_from(connection)
            if hello.get("token") != token:  # somebody else
                connection.close()
                continue
            found[hello["rank"], hello["kind"]] = hello, _prepared(connection)
    return {
        rank: _peer(rank, hello, talk, found[rank, "watch"][1])
        for (rank, kind), (hello, talk) in found.items()
        if kind == "talk"
    }


def _connected(rank: int, address: str, board: Board) -> dict[int, Peer]:
    about = json.loads(board.get(_KEY))
    made = []
    for kind in ("talk", "watch"):
        connection = socket.create_connection((address, about["port"]), timeout=_CONNECT_S)
        hello = {"rank": rank, "kind": kind, "token": about["token"], **_about_us()}
        text = json.dumps(hello).encode()
        connection.sendall(len(text).to_bytes(4, "little") + text)
        made.append(_prepared(connection))
    return {0: _peer(0, about, *made)}


def _peer(rank: int, about: Mapping[str, Any], talk: socket.socket, watch: socket.socket) -> Peer:
    return Peer(rank, about["pid"], about["host"], talk, watch)


def _about_us() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _name_of(rank: int, pid: int, host: str) -> str:
    return f"process {rank} (pid {pid} on {host})"


@contextlib.contextmanager
def _listening(address: str) -> Iterator[socket.socket]:
    """A listening socket at an address of this host; where the others know it by an address that
    is not its own, at all of them."""
    family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    try:
        listener = socket.create_server((str(place[0]), 0), family=family)
    except OSError:
        listener = socket.create_server(("", 0))
    with listener:
        yield listener


def _hello_from(connection: socket.socket) -> dict[str, Any]:
    """What a process says of itself; empty if it is none of ours."""
    connection.settimeout(_HELLO_S)
    try:
        head = bytearray(4)
        _read(connection, memoryview(head))
        text = bytearray(min(int.from_bytes(head, "little"), _MOST_BYTES))
        _read(connection, memoryview(text))
        found = json.loads(text)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _prepared(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if (option := getattr(socket, name, None)) is not None:  # the names are Linux's
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def _read(connection: socket.socket, place: memoryview) -> None:
    """
    Raises:
        ConnectionError: it was closed before ``place`` was full.
    """
    while len(place):
        count = connection.recv_into(place)
        if not count:
            raise ConnectionError("closed")
        place = place[count:]


def _note_from(peer: Peer) -> dict[str, Any] | None:
    """What a process says as it ends, or that it ended without a word; ``None``: nothing whole has
    arrived."""
    try:
        arrived = peer.watch.recv(_MOST_BYTES)
    except TimeoutError:
        return {"gone": f"{peer.name} of this trainer is gone: its host does not answer"}
    except OSError:
        arrived = b""
    peer.said += arrived
    line, newline, _ = peer.said.partition(b"\n")
    if newline:
        found: dict[str, Any] = json.loads(line)
        return found
    if arrived:
        return None
    return {"gone": f"{peer.name} of this trainer is gone: killed, or it crashed"}
