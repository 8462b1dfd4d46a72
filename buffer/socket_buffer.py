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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from buffer.counts import BufferStats, ReaderCounts
from buffer.deletions import Deleted, Deletions
from buffer.embedded_log import check_path
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
from buffer.seen import Identity
from buffer.socket_host import SocketHost, try_lock
from buffer.socket_messages import (
    MAX_CLAIMS,
    claimed_of,
    deleted_of,
    deletions_of,
    error_of,
    kept_of,
    read_so_far,
    records_of,
    refused_of,
    stats_of,
    undeleted_of,
)
from buffer.socket_wire import Line, away, connect, split, why_not_a_socket
from buffer.socket_writer import SocketWriter
from buffer.version_rules import check_group
from configs.urls import shown_url

_Taken = TypeVar("_Taken")
_LONGEST_NAME = 512


def _nothing(answer: dict[str, Any]) -> None:
    """What is made of an answer that only says that something was done."""


@dataclass(frozen=True, slots=True)
class RefusedReport(Report):
    """Processes that sent what is no message of ours."""

    connections: int

    @property
    def is_damaged(self) -> bool:
        return False

    def to_line(self) -> str:
        return f"refused: {self.connections} connections that sent what no server or trainer sends"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "refused", **asdict(self)}


class SocketBackend(Backend):
    """The buffer at one path."""

    def __init__(self, url: str, run_dir: Path) -> None:
        scheme, _, name = url.partition(":")
        if name:
            check_path(url, name, "path")
        if "?" in name:
            raise ValueError(f"buffer.url {shown_url(url)!r}: {scheme}: has no options")
        self._path = Path(name) if name else run_dir.absolute() / "traces.sock"
        problem = why_not_a_socket(self._path)
        if problem is not None:
            raise ValueError(
                f"buffer.url {shown_url(url)!r}: {problem}. Name another path, or remove what is "
                f"there"
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
            self._ask({"op": "keep", "name": name[:_LONGEST_NAME]}, _nothing, payload)

    def unreadable(self) -> list[Unreadable]:
        if self._host is not None:
            return self._host.backend.unreadable()
        return self._ask({"op": "kept"}, kept_of)

    def open_weights(self, line: str = "") -> FolderWeights:
        return FolderWeights(self._weights / line)

    def version_lines(self) -> list[str]:
        return lines_in(self._weights)

    def delete(self, tenant: str, *, until_ms: int | None = None) -> Deleted:
        if self._host is not None:
            return self._host.backend.delete(tenant, until_ms=until_ms)
        order = {"op": "delete", "tenant": tenant, "until_ms": until_ms}
        return self._ask(order, deleted_of)

    def undelete(self, digest: str) -> bool:
        if self._host is not None:
            return self._host.backend.undelete(digest)
        return self._ask({"op": "undelete", "digest": digest}, undeleted_of)

    def deletions(self) -> Deletions:
        if self._host is not None:
            return self._host.backend.deletions()
        return self._ask({"op": "deletions"}, deletions_of)

    def expire(self, limits: TraceLimits) -> None:
        if self._host is not None:
            self._host.backend.expire(limits)
        else:
            self._ask({"op": "expire", "limits": asdict(limits)}, _nothing)

    def stats(self) -> BufferStats:
        if self._host is not None:
            return self._host.backend.stats()
        return self._ask({"op": "stats"}, stats_of)

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        if self._host is not None:
            refused = self._host.refused
        else:
            refused = self._ask({"op": "refused"}, refused_of)
        return [RefusedReport(refused)] if refused else []

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

    def _ask(
        self, header: dict[str, Any], taken: Callable[[dict[str, Any]], _Taken], body: Payload = b""
    ) -> _Taken:
        line = connect(self._path)
        try:
            return ask(line, self._path, header, lambda answer, _: taken(answer), [body])
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
            self._give_up()
            raise

    def _give_up(self) -> None:
        self._offsets, self._before = self.offsets(), self.counts
        self._inner = None

    def commit(self, offsets: Offsets) -> None:
        if self._inner is None:
            raise ServiceAwayError(errno.ENOTCONN, "nobody holds the buffer at present")
        self._inner.commit(offsets)

    def claim(self, found: Sequence[tuple[Record, Identity]]) -> list[bool]:
        if self._inner is None:  # whoever held the buffer is gone, and these are nowhere else
            return [True] * len(found)
        try:
            return self._inner.claim(found)
        except ServiceAwayError:
            self._give_up()
            raise

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
            self._offsets, _ = self._say(header, lambda answer, _: read_so_far(answer))
        except BaseException:
            self._line.close()
            raise

    @property
    def counts(self) -> ReaderCounts:
        return self._counts

    def offsets(self) -> dict[str, Any]:
        return self._offsets

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        header = {"op": "read", "max_records": max_records, "max_bytes": max_bytes}
        so_far, records = self._say(
            header, lambda answer, body: (read_so_far(answer), _records(answer, body))
        )
        self._offsets, self._counts = so_far
        return records

    def commit(self, offsets: Offsets) -> None:
        if self._group is None:
            raise ValueError("a reader without a group has nothing to commit")
        self._say({"op": "commit", "offsets": dict(offsets)}, lambda *_: None)

    def claim(self, found: Sequence[tuple[Record, Identity]]) -> list[bool]:
        is_first: list[bool] = []
        for start in range(0, len(found), MAX_CLAIMS):
            is_first += self._claim(found[start : start + MAX_CLAIMS])
        return is_first

    def _claim(self, found: Sequence[tuple[Record, Identity]]) -> list[bool]:
        header = {
            "op": "claim",
            "traces": [(one.writer, one.location, *trace) for one, trace in found],
        }
        return self._say(header, lambda answer, _: claimed_of(answer, len(found)))

    def close(self) -> None:
        self._line.close()

    def _say(
        self, header: dict[str, Any], taken: Callable[[dict[str, Any], memoryview], _Taken]
    ) -> _Taken:
        with self._lock:
            return ask(self._line, self._path, header, taken)


def _records(answer: dict[str, Any], body: memoryview) -> list[Record]:
    found = records_of(answer, len(body))
    payloads = split(body, [size for _, _, size in found])
    return [
        Record(payload, writer, location)
        for payload, (writer, location, _) in zip(payloads, found, strict=True)
    ]


def ask(
    line: Line,
    path: Path,
    header: dict[str, Any],
    taken: Callable[[dict[str, Any], memoryview], _Taken],
    records: Sequence[Payload] = (),
) -> _Taken:
    """One question, and what ``taken`` makes of its answer.

    Raises:
        ServiceAwayError: there is no answer, or none that the holder of a buffer gives.
        OSError, ValueError: it was refused.
    """
    try:
        line.send(header, records)
        answer, body = line.receive()
        problem = error_of(answer)
        if problem is None:
            return taken(answer, body)
    except OSError as error:
        line.close()
        raise away(path, error.strerror or str(error)) from None
    raise problem
