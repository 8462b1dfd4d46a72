"""Holds a buffer in the memory of one process, and lets others reach it over a Unix socket.

Consumes: connections, a thread for each.
Waits for: whoever is connected. What it holds ends with the process; nothing is on a disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from buffer.files import OWNER_FOLDER, open_regular
from buffer.interface import Record, RecordReader, TraceLimits
from buffer.memory import DEFAULT_BYTES, MemoryBackend, MemoryWriter
from buffer.seen import Identity
from buffer.socket_messages import MAX_READ_RECORDS, BadMessageError, Caps
from buffer.socket_wire import Line, is_own, listen, split, why_not_a_socket
from configs.logs import Lasting

log = logging.getLogger(__name__)

_MOST_LINES = 1024
"""Connections at the same time, each of which has a thread."""
_MOST_WRITERS = 100_000
_AGAIN_S = 0.1
_TEND_S = 1.0
"""Seconds between two looks for records that have grown too old."""

_Answer = tuple[dict[str, Any], Sequence[memoryview | bytes | bytearray]]


class SocketHost:
    """The process that holds the buffer at one path."""

    def __init__(self, path: Path, lock: int) -> None:
        """
        Args:
            path: of the socket.
            lock: descriptor of its lock, see ``try_lock``.

        Raises:
            OSError: the socket cannot be made.
        """
        self.backend = MemoryBackend.private()
        self._path = path
        self._lock = lock
        self.refused = 0
        """Connections that were ended since what they sent was no message of ours."""
        self._writers: dict[str, MemoryWriter] = {}
        self._lines: set[Line] = set()
        self._guard = threading.Lock()
        """Guards the two above."""
        self._said = Lasting()
        self._stopping = threading.Event()
        self._listening = listen(path)
        for target, name in ((self._accept, "buffer-host"), (self._tend, "buffer-tend")):
            threading.Thread(target=target, name=name, daemon=True).start()

    def close(self) -> None:
        """Forget everything, and let another process take over."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._guard:
            for line in self._lines:
                line.close()
        if why_not_a_socket(self._path) is None:
            self._path.unlink(missing_ok=True)
        os.close(self._lock)

    def writer(self, name: str, limits: TraceLimits) -> MemoryWriter:
        """The writer of this name; a new one if it was not here before."""
        with self._guard:
            if name not in self._writers:
                if len(self._writers) >= _MOST_WRITERS:
                    raise ValueError(f"the buffer has had {_MOST_WRITERS} writers")
                self._writers[name] = self.backend.open_named_writer(name, limits)
            return self._writers[name]

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connected, _ = self._listening.accept()
            except OSError:  # it is closing; or there are too many open files at present
                self._stopping.wait(_AGAIN_S)
                continue
            if not is_own(connected) or len(self._lines) >= _MOST_LINES:
                connected.close()
                continue
            line = Line(connected)
            with self._guard:
                self._lines.add(line)
            serving = threading.Thread(
                target=self._serve, args=(line,), name="buffer-line", daemon=True
            )
            try:
                serving.start()
            except RuntimeError:  # no more threads at present
                self._hang_up(line)

    def _serve(self, line: Line) -> None:
        session = _Session(self)
        try:
            while True:
                header, body = line.receive_request(session.caps)
                try:
                    answer = session.answer(header, body)
                except BadMessageError:
                    raise
                except (ValueError, OSError) as error:
                    number = getattr(error, "errno", None)
                    answer = {"error": str(error), "errno": number}, ()
                line.send(*answer)
        except BadMessageError as error:
            self._refuse(error.strerror or "")
        except OSError:  # the other process has ended, or the host is closing
            pass
        except Exception as error:  # ours; it must cost the others nothing
            self._refuse(f"it led to {type(error).__name__}")
        finally:
            session.close()
            self._hang_up(line)

    def _hang_up(self, line: Line) -> None:
        line.close()
        with self._guard:
            self._lines.discard(line)

    def _refuse(self, problem: str) -> None:
        with self._guard:
            self.refused += 1
        if self._said.is_new(problem):
            log.warning(
                "a process sent to %s what no server or trainer sends (%s), and lost its "
                "connection; %d have so far",
                self._path,
                problem,
                self.refused,
            )

    def _tend(self) -> None:
        while not self._stopping.wait(_TEND_S):
            with self._guard:
                writers = list(self._writers.values())
            for writer in writers:
                try:
                    writer.tend()
                except Exception:  # of one writer; the records of all others grow old, too
                    log.exception("records that are too old cannot be removed")


class _Session:
    """What one connection has opened. A reader that leaves lets others have what it held."""

    def __init__(self, host: SocketHost) -> None:
        self._host = host
        self.caps = Caps()
        """What is taken from this connection, by the settings of whoever is at its other end: a
        server may allow larger traces than its trainer."""
        self._writer: MemoryWriter | None = None
        self._reader: RecordReader | None = None

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def answer(self, header: dict[str, Any], body: memoryview) -> _Answer:
        """
        Raises:
            ValueError, OSError: the request is refused; the message goes back.
        """
        backend = self._host.backend
        match header:
            case {"op": "write", "name": str(name), "limits": dict(limits)}:
                found = TraceLimits(**limits)
                self._writer = self._host.writer(name, found)
                self.caps = Caps(found.max_bytes or DEFAULT_BYTES)
                return self._written(), ()
            case {"op": "append", "first": int(first), "sizes": list(sizes)}:
                return self._append(first, split(body, sizes)), ()
            case {"op": "tend"} if self._writer is not None:
                self._writer.tend()
                return self._written(), ()
            case {"op": "open", "group": str() | None as group, "offsets": offsets}:
                self._reader = backend.open_record_reader(offsets, group)
                return self._read_so_far(), ()
            case {"op": "read", "max_records": int(records), "max_bytes": int(num_bytes)}:
                return self._read(min(records, MAX_READ_RECORDS), num_bytes)
            case {"op": "refused"}:
                return {"refused": self._host.refused}, ()
            case {"op": "commit", "offsets": dict(offsets)} if self._reader is not None:
                self._reader.commit(offsets)
                return {}, ()
            case {"op": "claim", "traces": list(traces)} if self._reader is not None:
                return {"is_first": self._reader.claim([_claim_of(*one) for one in traces])}, ()
            case {"op": "stats"}:
                return {"stats": asdict(backend.stats())}, ()
            case {"op": "delete", "tenant": str(tenant), "until_ms": int() | None as until_ms}:
                return {"deleted": asdict(backend.delete(tenant, until_ms=until_ms))}, ()
            case {"op": "undelete", "digest": str(digest)}:
                return {"was_listed": backend.undelete(digest)}, ()
            case {"op": "expire", "limits": dict(limits)}:
                backend.expire(TraceLimits(**limits))
                return {}, ()
            case {"op": "deletions"}:
                return {"deletions": dict(backend.deletions().until_ms)}, ()
            case {"op": "kept"}:
                return {"kept": [astuple(one) for one in backend.unreadable()]}, ()
            case {"op": "keep", "name": str(name)}:
                backend.keep_unreadable(name, body)
                return {}, ()
        raise BadMessageError("a request came before another that it needs")

    def _append(self, first: int, records: Sequence[memoryview]) -> dict[str, Any]:
        """Store records that are not here yet: the answer to an earlier attempt may be lost."""
        writer = self._writer
        if writer is None:
            raise BadMessageError("records came before the name of their writer")
        have = writer.counts.appended
        for record in records[max(0, have - first) :]:
            writer.append(record)
        writer.sync()
        return self._written()

    def _written(self) -> dict[str, Any]:
        assert self._writer is not None
        counts = self._writer.counts
        return {
            "have": counts.appended,
            "evicted": [counts.evicted_records, counts.evicted_bytes],
        }

    def _read(self, max_records: int, max_bytes: int) -> _Answer:
        if self._reader is None:
            raise BadMessageError("a reader must be opened first")
        records = self._reader.read(max_records, max_bytes)
        found = [[one.writer, one.location, len(one.payload)] for one in records]
        return {"records": found, **self._read_so_far()}, [one.payload for one in records]

    def _read_so_far(self) -> dict[str, Any]:
        assert self._reader is not None
        return {"offsets": self._reader.offsets(), "counts": asdict(self._reader.counts)}


def _claim_of(
    writer: str, location: str, producer: str, epoch: int, seq: int
) -> tuple[Record, Identity]:
    """What ``RecordReader.claim`` takes."""
    return Record(b"", writer, location), (producer, epoch, seq)


def try_lock(path: Path) -> int | None:
    """The lock that says who holds the buffer at ``path``, as a descriptor that ends it when it is
    closed; ``None`` while another process has it.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(mode=OWNER_FOLDER, parents=True, exist_ok=True)
    name = path.with_name(f"{path.name}.lock")
    descriptor = open_regular(name, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
