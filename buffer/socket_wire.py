"""Messages between the process that holds a buffer in memory and the others: over a Unix socket.

    header length 4 | body length 8 | header, a JSON object | body, records behind each other

Nothing in a message is executed, and both ends belong to one user: whoever connects must have the
same user id, and the socket is its owner's alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from buffer.files import kind_of
from buffer.interface import Payload, ServiceAwayError
from buffer.small_json import SmallJsonError, parse_small_json
from buffer.socket_messages import BadMessageError, Caps, check_request

TIMEOUT_S = 5.0
"""Longest wait for an answer, seconds."""
_TAKE_S = 60.0
"""Longest time for the other end to take an answer, seconds."""
MAX_REQUEST_BYTES = 4 << 20
"""Of the header of a request: a reader's offsets, of thousands of writers."""
MAX_ANSWER_BYTES = 64 << 20
"""Of the header of an answer: a list of deletions, of a million tenants."""
MAX_BODY_BYTES = 4 << 30
"""Of an answer. Memory is taken as it arrives, not as it is announced."""
_STEP_BYTES = 8 << 20
"""Memory taken at a time."""

_HEAD = struct.Struct("<IQ")


class Line:
    """One end of a connection. Used by one thread at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def send(self, header: dict[str, Any], records: Sequence[Payload] = ()) -> None:
        """
        Raises:
            OSError: the other end is gone, or takes nothing for ``TIMEOUT_S``.
        """
        text = json.dumps(header).encode()
        sizes = [len(record) for record in records]
        self._socket.sendall(_HEAD.pack(len(text), sum(sizes)) + text)
        for record in records:
            self._socket.sendall(record)

    def receive(self) -> tuple[dict[str, Any], memoryview]:
        """The next answer and its body, which is writable.

        Raises:
            OSError: the other end is gone.
            BadMessageError: it sends what is no message.
        """
        header, num_body = self._receive_header(MAX_ANSWER_BYTES)
        if num_body > MAX_BODY_BYTES:
            raise BadMessageError("an answer is too long")
        return header, self._exactly(num_body)

    def receive_request(self, caps: Caps) -> tuple[dict[str, Any], memoryview]:
        """The next request and its body; waits for its first byte as long as it takes, and then
        for each part as long as for an answer.

        Raises:
            OSError: the other end is gone.
            BadMessageError: it sends what is no request.
        """
        self._socket.settimeout(None)
        first = self._exactly(1)
        self._socket.settimeout(TIMEOUT_S)
        header, num_body = self._receive_header(MAX_REQUEST_BYTES, first)
        check_request(header, num_body, caps)
        body = self._exactly(num_body)
        self._socket.settimeout(_TAKE_S)  # of the whole answer
        return header, body

    def _receive_header(self, max_bytes: int, begun: bytes | memoryview = b"") -> tuple[Any, int]:
        """A header, and the bytes of the body that follows."""
        rest = self._exactly(_HEAD.size - len(begun))
        num_header, num_body = _HEAD.unpack(bytes(begun) + bytes(rest))
        if num_header > max_bytes:
            raise BadMessageError("a message is too long")
        try:
            content = parse_small_json(self._exactly(num_header), max_bytes)
        except SmallJsonError:
            content = None
        if not isinstance(content, dict):
            raise BadMessageError("a message has no JSON object")
        return content, num_body

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, num_bytes: int) -> memoryview:
        content = bytearray(min(num_bytes, _STEP_BYTES))
        at = 0
        while at < num_bytes:
            if at == len(content):
                content.extend(bytes(min(num_bytes - at, _STEP_BYTES)))
            with memoryview(content) as view, view[at:] as free:
                got = self._socket.recv_into(free)
            if got == 0:
                raise ConnectionResetError(errno.ECONNRESET, "the other end is gone")
            at += got
        return memoryview(content)


def split(body: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    """Records of a body; the sizes are known to be those of the body."""
    assert sum(sizes) == len(body)
    records, at = [], 0
    for size in sizes:
        records.append(body[at : at + size])
        at += size
    return records


def connect(path: Path) -> Line:
    """Connect to the process that holds the buffer.

    Raises:
        ServiceAwayError: there is none.
    """
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.settimeout(TIMEOUT_S)
    try:
        with _short(path) as name:
            found.connect(name)
    except OSError as error:
        found.close()
        raise away(path, error.strerror or str(error)) from None
    return Line(found)


def why_not_a_socket(path: Path) -> str | None:
    """What lies at a path that is to be a socket's, in words; ``None``: a socket, or nothing."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing, or what whoever makes the socket will be told
        return None
    if stat.S_ISSOCK(mode):
        return None
    return f"{path} is {kind_of(mode) or 'a file'}, not a socket: it is left as it is"


def listen(path: Path) -> socket.socket:
    """A listening socket that only its owner may connect to; one that lay there is replaced.

    Raises:
        FileExistsError: something else than a socket lies there.
        OSError: the folder cannot be written.
    """
    problem = why_not_a_socket(path)
    if problem is not None:
        raise FileExistsError(errno.EEXIST, problem)
    path.unlink(missing_ok=True)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as name:
            before = os.umask(0o177)
            try:
                found.bind(name)
            finally:
                os.umask(before)
        found.listen(64)
    except OSError:
        found.close()
        raise
    return found


def is_own(connected: socket.socket) -> bool:
    """Whether the process at the other end belongs to the same user."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True  # the permissions of the socket have decided
    size = struct.calcsize("3i")
    found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, _ = struct.unpack("3i", found)
    return bool(uid == os.geteuid())


def away(path: Path, problem: str) -> ServiceAwayError:
    """The error that says that nobody holds the buffer."""
    return ServiceAwayError(
        errno.ENOTCONN, f"no trainer holds the buffer at {path} in memory: {problem}"
    )


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of the path that fits an address, which has 107 bytes at most."""
    if len(os.fsencode(path)) < 100 or not os.path.isdir("/proc/self/fd"):
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
