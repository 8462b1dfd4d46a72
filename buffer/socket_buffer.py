"""A buffer that is never on a disk, ``socket:`` or ``socket:/some/path``.

Traces lie in the memory of the first trainer that opens it. Servers on the same machine send them
there over a Unix socket, ``run_dir/traces.sock`` unless the URL names another path; what is there
ends with that trainer. Versions of the drafter, which hold no text, are in ``run_dir/weights``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from buffer.counts import BufferStats, GroupCounts, ReaderCounts
from buffer.deletions import Deleted, Deletions
from buffer.folder_weights import FolderWeights, lines_in
from buffer.interface import (
    MAX_READ_BYTES,
    Backend,
    Offsets,
    Payload,
    Record,
    RecordReader,
    Report,
    ServiceAwayError,
    TraceLimits,
    Unreadable,
)
from buffer.socket_host import SocketHost, try_lock
from buffer.socket_wire import Line, away, connect, split, why_not_a_socket
from buffer.socket_writer import SocketWriter
from buffer.version_rules import check_group


class SocketBackend(Backend):
    """The buffer at one path."""

    def __init__(self, url: str, run_dir: Path) -> None:
        scheme, _, name = url.partition(":")
        if name and not name.startswith("/"):
            raise ValueError(
                f"buffer.url {url!r} must name an absolute path, as in '{scheme}:/{name}'"
            )
        self._path = Path(name) if name else run_dir.absolute() / "traces.sock"
        problem = why_not_a_socket(self._path)
        if problem is not None:
            raise ValueError(
                f"buffer.url {url!r}: {problem}. Name another path, or remove what is there"
            )
        self._weights = run_dir / "weights"
        self._host: SocketHost | None = None

    def host(self) -> bool:
        """Hold the buffer in this process if no other does, as long as this object lives.

        Returns:
            Whether this process holds it.

        Raises:
            OSError: the socket cannot be made.
        """
        if self._host is None:
            lock = try_lock(self._path)
            if lock is None:
                return False
            try:
                self._host = SocketHost(self._path, lock)
            except OSError:
                os.close(lock)
                raise
            weakref.finalize(self, self._host.close)
        return True

    def open_trace_writer(self, limits: TraceLimits) -> SocketWriter:
        return SocketWriter(self._path, limits)

    def open_record_reader(
        self, offsets: Offsets | None = None, group: str | None = None
    ) -> SocketReader:
        """A member of a group holds the buffer, unless another process does."""
        return SocketReader(self, offsets, group)

    def keep_unreadable(self, name: str, payload: Payload) -> None:
        if self._host is not None:
            self._host.backend.keep_unreadable(name, payload)
            return
        with contextlib.suppress(OSError):
            self._ask({"op": "keep", "name": name}, payload)

    def unreadable(self) -> list[Unreadable]:
        if self._host is not None:
            return self._host.backend.unreadable()
        return [Unreadable(*one) for one in self._ask({"op": "kept"})["kept"]]

    def open_weights(self, line: str = "") -> FolderWeights:
        return FolderWeights(self._weights / line)

    def version_lines(self) -> list[str]:
        return lines_in(self._weights)

    def delete(self, tenant: str, *, until_ms: int | None = None) -> Deleted:
        if self._host is not None:
            return self._host.backend.delete(tenant, until_ms=until_ms)
        order = {"op": "delete", "tenant": tenant, "until_ms": until_ms}
        return Deleted(**self._ask(order)["deleted"])

    def undelete(self, digest: str) -> bool:
        if self._host is not None:
            return self._host.backend.undelete(digest)
        return bool(self._ask({"op": "undelete", "digest": digest})["was_listed"])

    def deletions(self) -> Deletions:
        if self._host is not None:
            return self._host.backend.deletions()
        return Deletions.from_json(self._ask({"op": "deletions"})["deletions"])

    def expire(self, limits: TraceLimits) -> None:
        if self._host is not None:
            self._host.backend.expire(limits)
        else:
            self._ask({"op": "expire", "limits": asdict(limits)})

    def stats(self) -> BufferStats:
        if self._host is not None:
            return self._host.backend.stats()
        found = self._ask({"op": "stats"})["stats"]
        groups = tuple(GroupCounts(**group) for group in found.pop("groups"))
        return BufferStats(**found, groups=groups)

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        return ()

    def reader_here(self, offsets: Offsets | None, group: str | None) -> RecordReader:
        """A reader of what this process holds, or of what another one does.

        Raises:
            ServiceAwayError: nobody holds the buffer.
            ValueError: the offsets are refused.
        """
        if group is not None:
            self.host()
        if self._host is not None:
            return self._host.backend.open_record_reader(offsets, group)
        return RemoteReader(self._path, offsets, group)

    def _ask(self, header: dict[str, Any], body: Payload = b"") -> dict[str, Any]:
        line = connect(self._path)
        try:
            return ask(line, self._path, header, [body])[0]
        finally:
            line.close()


class SocketReader(RecordReader):
    """A reader that outlives the process that it reads from: with another one it begins again."""

    def __init__(self, backend: SocketBackend, offsets: Offsets | None, group: str | None) -> None:
        if group is not None:
            check_group(group)
        self._backend = backend
        self._group = group
        self._offsets: dict[str, Any] = dict(offsets or {})
        self._before = ReaderCounts()
        """Of readers that were given up."""
        self._inner: RecordReader | None = None
        with contextlib.suppress(ServiceAwayError):
            self._inner = backend.reader_here(offsets, group)

    @property
    def counts(self) -> ReaderCounts:
        before, now = self._before, ReaderCounts() if self._inner is None else self._inner.counts
        return ReaderCounts(
            before.read + now.read,
            evicted_unread=before.evicted_unread + now.evicted_unread,
            deleted=before.deleted + now.deleted,
        )

    def offsets(self) -> dict[str, Any]:
        return self._offsets if self._inner is None else self._inner.offsets()

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        if self._inner is None:
            self._inner = self._backend.reader_here(self._offsets, self._group)
        try:
            return self._inner.read(max_records, max_bytes)
        except ServiceAwayError:
            self._offsets, self._before = self.offsets(), self.counts
            self._inner = None
            raise

    def commit(self, offsets: Offsets) -> None:
        if self._inner is None:
            raise ServiceAwayError(errno.ENOTCONN, "nobody holds the buffer at present")
        self._inner.commit(offsets)

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()


class RemoteReader(RecordReader):
    """A reader of what another process holds."""

    def __init__(self, path: Path, offsets: Offsets | None, group: str | None) -> None:
        self._path = path
        self._group = group
        self._line: Line = connect(path)
        self._counts = ReaderCounts()
        self._lock = threading.Lock()
        header = {"op": "open", "group": group, "offsets": dict(offsets) if offsets else None}
        try:
            self._offsets: dict[str, Any] = self._ask(header)[0]["offsets"]
        except BaseException:
            self._line.close()
            raise

    @property
    def counts(self) -> ReaderCounts:
        return self._counts

    def offsets(self) -> dict[str, Any]:
        return self._offsets

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        answer, body = self._ask({"op": "read", "max_records": max_records, "max_bytes": max_bytes})
        self._counts = ReaderCounts(**answer["counts"])
        self._offsets = answer["offsets"]
        payloads = split(body, [size for _, _, size in answer["records"]])
        return [
            Record(payload, writer, location)
            for payload, (writer, location, _) in zip(payloads, answer["records"], strict=True)
        ]

    def commit(self, offsets: Offsets) -> None:
        if self._group is None:
            raise ValueError("a reader without a group has nothing to commit")
        self._ask({"op": "commit", "offsets": dict(offsets)})

    def close(self) -> None:
        self._line.close()

    def _ask(self, header: dict[str, Any]) -> tuple[dict[str, Any], memoryview]:
        with self._lock:
            return ask(self._line, self._path, header)


def ask(
    line: Line, path: Path, header: dict[str, Any], records: list[Payload] | None = None
) -> tuple[dict[str, Any], memoryview]:
    """One question and its answer.

    Raises:
        ServiceAwayError: there is none.
        ValueError: it was refused.
    """
    try:
        line.send(header, records or ())
        answer, body = line.receive()
    except OSError as error:
        raise away(path, error.strerror or str(error)) from None
    if "error" in answer:
        if answer["errno"] is None:
            raise ValueError(answer["error"])
        raise OSError(answer["errno"], answer["error"])
    return answer, body
