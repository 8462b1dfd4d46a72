"""What every buffer backend offers: a trace writer, a record reader and a weights store.

Traces are delivered at least once: a record that ``sync`` acknowledged reaches every reader unless
it was evicted first, and every loss is counted. A reader alone keeps its own offsets and leaves no
mark in the buffer. Readers of a named group share the records, and the buffer remembers what they
have committed; see ``RecordReader``. Versions of the weights are published whole or not at all, and
a version number is never reused.

To add a backend, subclass ``Backend``, ``TraceWriter``, ``RecordReader`` and
``weights_store.WeightsStore`` in one file and name it in the catalog, ``backends.py``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from buffer.counts import BufferStats, ReaderCounts, WriterCounts
from buffer.deletions import Deleted, Deletions
from buffer.seen import Identity
from buffer.weights_store import WeightsStore

MAX_READ_BYTES = 64 << 20
"""Payload bytes after which one ``read`` stops."""
MAX_UNREADABLE_BYTES = 64 << 20
"""Undecodable records that a backend keeps for inspection, in bytes."""

Payload = bytes | bytearray | memoryview
"""Bytes of a record."""

Location = tuple[str, str]
"""Writer and location of a record, see ``Record``."""

Offsets = Mapping[str, Any]
"""How far a reader has come, as its backend stores it; survives a round trip through JSON."""


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """How much the trace log may hold, and how long a record may wait for its acknowledgement."""

    segment_bytes: int
    """Size at which a segment is closed and the next one begun. Backends without segments ignore
    it."""
    max_bytes: int | None
    """Bytes of all records of all writers; the oldest are evicted first. ``None``: as many as an
    hour of traffic takes, see ``hour_of_traffic.py``; a backend without a disk holds 1 GiB."""
    ttl_s: float
    """Age at which records are evicted, seconds."""
    sync_interval_s: float
    """Longest time a record waits in ``tend`` for its acknowledgement, seconds."""

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 2 * self.segment_bytes:
            raise ValueError(
                f"max_bytes={self.max_bytes} holds less than two segments of "
                f"segment_bytes={self.segment_bytes}; raise max_bytes or lower segment_bytes"
            )


class RecordTooLargeError(OSError):
    """A record is larger than the buffer takes, now or ever. Its errno is EFBIG."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EFBIG, text)


def check_record(num_bytes: int, max_bytes: int) -> None:
    """Refuse a record that would take over half of the log.

    Args:
        num_bytes: size of the record.
        max_bytes: what the log may hold at present.

    Raises:
        RecordTooLargeError: it would.
    """
    if num_bytes > max_bytes // 2:
        raise RecordTooLargeError(
            f"a record of {num_bytes} bytes is over half of max_bytes={max_bytes}"
        )


class TraceWriter(Protocol):
    """Appends records to the log. Used by one thread; never waits for a reader.

    A backend with a service may keep appended records in bounded memory until ``sync`` or ``tend``
    sends them, so readers are sure to find a record only once it is acknowledged. While the service
    is away, calls fail or return within seconds, and records wait until it is back.
    """

    @property
    def name(self) -> str:
        """Name of this writer, unique within the buffer."""
        ...

    @property
    def counts(self) -> WriterCounts: ...

    def append(self, payload: Payload) -> int:
        """Take one record; ``sync`` or ``tend`` acknowledges it later.

        Returns:
            The record's running number within this writer, from 0.

        Raises:
            RecordTooLargeError: the record was not written, and the writer remains usable.
            OSError: storage is full or failing; likewise.
        """
        ...

    def append_all(self, payloads: Sequence[Payload]) -> list[OSError]:
        """Write several records, as ``append`` does each.

        Returns:
            The errors of those that were not written.
        """
        errors = []
        for payload in payloads:
            try:
                self.append(payload)
            except OSError as error:
                errors.append(error)
        return errors

    def sync(self) -> range:
        """Wait until everything appended is stored.

        Returns:
            Numbers of the records that this call acknowledged.

        Raises:
            OSError: storage failed. A disk's pending records are counted ``doubtful``; those of a
                service stay ``pending``, and are sent again.
        """
        ...

    def tend(self) -> range:
        """Do the work that is due: sync, evict. Call it often.

        Returns:
            Numbers of the records that this call acknowledged.

        Raises:
            OSError: as ``sync``.
        """
        ...

    def remove(self, is_unwanted: Callable[[Payload], bool]) -> int:
        """Remove, count as ``deleted`` and return the number of records that were not sent yet."""
        return 0

    def close(self) -> None:
        """Sync, then tell readers that this writer is done. Nothing is pending afterwards."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Record:
    """One record as a reader receives it."""

    payload: Payload
    writer: str
    location: str
    """Where it is stored; unique within the writer, fit for a file name; e.g. ``000042-1024``."""


class ServiceAwayError(OSError):
    """A backend's service cannot be used at present: it does not answer, or refuses. Try again."""


class RecordReader(Protocol):
    """Follows all writers of a buffer; ``read`` never waits for records.

    Opened without a group, it reads everything from its own offsets and writes nothing.

    Members of a group share the records: each is handed to one of them. It is that member's until
    the member commits it, closes, or is taken for dead; in the last two cases another member
    gets it. A record is therefore read again after a crash, but never after it was committed.
    Commit only what is safe elsewhere: a trainer commits what its newest checkpoint has learnt.
    Committed records stay readable for others until they are evicted.

    ``commit`` and ``close`` may be called while another thread is in ``read``.
    """

    @property
    def counts(self) -> ReaderCounts:
        """Counts since this reader was opened."""
        ...

    def offsets(self) -> dict[str, Any]:
        """Offsets from which ``open_record_reader`` continues; JSON can hold them. Cheap."""
        ...

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        """New records since the last call, in order within each writer; empty if there are none.

        Stops early once ``max_bytes`` are reached. In a group, records that another member left
        behind may come after later ones of the same writer.

        Raises:
            ServiceAwayError: try again later.
            OSError: storage failed.
        """
        ...

    def commit(self, offsets: Offsets) -> None:
        """The group is done with all that this reader had returned when ``offsets`` was taken.

        May be repeated. Once it has returned, no member gets these records again.

        Args:
            offsets: what ``offsets()`` of this reader returned.

        Raises:
            OSError: storage failed; commit these offsets or later ones again.
            ValueError: this reader belongs to no group.
        """
        ...

    def claim(self, found: Sequence[tuple[Record, Identity]]) -> list[bool]:
        """Ask the group which of these records, read and not committed, are to be learnt from.

        A trace may be in several records, which different members may get: it was sent again, or
        replayed. The first record that is claimed with it is the trace's for this group. Whoever
        gets that record later, because a member died with it, may learn from it; nobody may learn
        from the others, now or once it is committed. Should it be evicted before it was committed,
        the next record that is claimed takes its place.

        Args:
            found: records and the traces they hold, in the order in which they are claimed.

        Returns:
            Whether each record is its trace's. All are for a reader without a group, which knows by
            itself what it has seen.

        Raises:
            ServiceAwayError: try again later.
            OSError: storage failed.
        """
        return [True] * len(found)

    def close(self) -> None:
        """Leave the group: what was read and not committed goes to other members at once."""
        return None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that ``Backend.keep_unreadable`` keeps."""

    name: str
    num_bytes: int


class Report(Protocol):
    """One line of ``buffer inspect``."""

    @property
    def is_damaged(self) -> bool: ...

    def to_line(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


class Backend(Protocol):
    """Storage for traces and weights, opened with ``buffer.url``."""

    def __init__(self, url: str, run_dir: Path) -> None:
        """Open the storage that ``url`` names, without writing to it.

        Args:
            url: value of ``buffer.url``, scheme included.
            run_dir: folder of the run, for backends that keep their files there.

        Raises:
            ValueError: the URL does not fit the backend.
        """
        ...

    @property
    def spool_bytes(self) -> int | None:
        """What a writer keeps in memory until its service has it, before it drops the oldest;
        ``None``: there is no service, and records are stored at once."""
        return None

    @property
    def run(self) -> str | None:
        """Name of the run within a service that holds several; ``None``: the URL or the run folder
        leads to one alone."""
        return None

    @property
    def ends_with_process(self) -> bool:
        """It is in the memory of this process, and nobody else's."""
        return False

    def open_trace_writer(self, limits: TraceLimits) -> TraceWriter:
        """A new writer for this process.

        Raises:
            OSError: storage failed.
        """
        ...

    def open_record_reader(
        self, offsets: Offsets | None = None, group: str | None = None
    ) -> RecordReader:
        """A reader of its own, or a member of a group.

        Nothing is stored before its first ``read``, so opening a reader makes no group.

        Args:
            offsets: continue from these; ``None``: from the oldest record. A member commits them
                at its first ``read``, and then takes back what the reader that they came from had
                read after them.
            group: name of the group, letters, digits and ``._-``; ``None``: read everything.

        Raises:
            ValueError: ``offsets`` are not those of such a reader of this backend, or ``group`` is
                no such name.
        """
        ...

    def fetch(self, locations: Collection[Location]) -> dict[Location, Payload] | None:
        """The records at these locations, as far as they are still stored and sound, in time that
        does not grow with what else is stored.

        Returns:
            ``None``: this backend finds records only by reading all of them.

        Raises:
            OSError: storage failed.
        """
        return None

    def keep_unreadable(self, name: str, payload: Payload) -> None:
        """Keep a record that could not be decoded, for inspection. Best effort: never raises, and
        drops it once ``MAX_UNREADABLE_BYTES`` are kept."""
        ...

    def unreadable(self) -> Iterable[Unreadable]:
        """The records that ``keep_unreadable`` keeps; none if the backend cannot list them.

        Raises:
            OSError: storage failed.
        """
        return ()

    def open_weights(self, line: str = "") -> WeightsStore:
        """The published versions of one drafter.

        Args:
            line: name of its version line, where a run has several drafters; empty for the first.
        """
        ...

    def version_lines(self) -> list[str]:
        """Names of version lines beside the first, as far as the backend can list them."""
        return []

    def delete(self, tenant: str, *, until_ms: int | None = None) -> Deleted:
        """Delete all records of a tenant, put-aside ones among them, and list the tenant, so that
        those of its earlier requests that arrive later are dropped. Repeat it after an error.
        Readers, and groups that had not got a record, count it. What the tenant sends from now on
        is kept.

        Args:
            until_ms: traces that ended until then are dropped when they arrive, unix ms; ``None``:
                until now, or as long as ``deletions.Ends`` allows.

        Raises:
            OSError: storage failed, or removes nothing.
        """
        raise OSError(errno.ENOTSUP, f"{type(self).__name__} cannot delete records of a tenant")

    def undelete(self, digest: str) -> bool:
        """Take a deletion back: what arrives from now on is kept. Nothing that was removed comes
        back, but where records were only listed as deleted, they are read again.

        Args:
            digest: under which the tenant is listed.

        Returns:
            Whether it was listed.

        Raises:
            OSError: storage failed.
            ValueError: the list is damaged.
        """
        raise OSError(errno.ENOTSUP, f"{type(self).__name__} has no list of deletions")

    def deletions(self) -> Deletions:
        """The tenants that were deleted. Raises OSError, or ValueError if the list is damaged."""
        return Deletions()

    def expire(self, limits: TraceLimits) -> None:
        """Remove what is too old, put-aside records too, as writers do. Raises OSError."""

    def stats(self) -> BufferStats:
        """Count what is stored, and what each group has done with it, without changing anything.

        Raises:
            OSError: storage failed.
        """
        ...

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        """State of the stored records for ``buffer inspect``, without changing anything.

        Args:
            limits: what the settings allow the records to take.
        """
        ...
