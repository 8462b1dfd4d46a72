"""What every buffer backend offers: a trace writer, a record reader and a weights store.

Traces are delivered at least once: a record that ``sync`` acknowledged reaches every reader unless
it was evicted first, and every loss is counted. A reader alone keeps its own offsets and leaves no
mark in the buffer. Readers of a named group share the records, and the buffer remembers what they
have committed; see ``RecordReader``. Versions of the weights are published whole or not at all, and
a version number is never reused.

To add a backend, subclass ``Backend``, ``TraceWriter``, ``RecordReader`` and ``WeightsStore`` in
one file and name it in the catalog, ``backends.py``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from buffer.bundles import Bundle, BundleError, BundleInBuffer, ExpectedTensors, HostBuffer
from buffer.counts import BufferStats, ReaderCounts, WriterCounts
from buffer.records import Manifest

MAX_READ_BYTES = 64 << 20
"""Payload bytes after which one ``read`` stops."""
MAX_UNREADABLE_BYTES = 64 << 20
"""Undecodable records that a backend keeps for inspection, in bytes."""

Payload = bytes | bytearray | memoryview
"""Bytes of a record."""

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


def check_record(num_bytes: int, max_bytes: int) -> None:
    """Refuse a record that would take over half of the log.

    Args:
        num_bytes: size of the record.
        max_bytes: what the log may hold at present.

    Raises:
        OSError: with errno EFBIG.
    """
    if num_bytes > max_bytes // 2:
        raise OSError(
            errno.EFBIG, f"a record of {num_bytes} bytes is over half of max_bytes={max_bytes}"
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
            OSError: the record is too large (EFBIG) or storage is full or failing. The record was
                not written, and the writer remains usable.
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

    def close(self) -> None:
        """Leave the group: what was read and not committed goes to other members at once."""
        return None


class SupersededError(ValueError):
    """Another trainer has taken over the weights store."""

    def __init__(self, location: str, epoch: int, newest: int) -> None:
        super().__init__(
            f"another trainer took over {location} (epoch {newest}, ours is {epoch}): nothing is "
            f"published. Let one trainer run, or give each a weights store of its own"
        )


class WeightsStore(Protocol):
    """Published versions of a drafter, each with its manifest and files."""

    @property
    def location(self) -> str:
        """Where the versions are stored, for messages."""
        ...

    def versions(self) -> list[int]:
        """Stored versions, ascending. Listed, not checked."""
        ...

    def next_version(self) -> int:
        """Lowest version that may still be published; 0 in an empty store.

        Raises:
            ValueError: the store no longer knows which versions were used.
        """
        ...

    def take_over(self) -> int:
        """Become the one that publishes, in place of any other trainer.

        Returns:
            The new epoch, higher than all before, for ``publish``.

        Raises:
            OSError: storage failed.
        """
        ...

    def publish(
        self, manifest: Manifest, files: Mapping[str, bytes], epoch: int | None = None
    ) -> Manifest:
        """Make a new version visible, whole or not at all.

        Of several that publish the same version, or versions out of order, at once, one succeeds
        and the others are refused.

        Args:
            manifest: everything but ``files``, which is filled in here.
            files: name -> content; ``drafter.safetensors`` must be among them.
            epoch: what ``take_over`` returned; ``None``: publish whoever has taken over.

        Returns:
            The manifest as published.

        Raises:
            SupersededError: somebody took over after ``epoch``; nothing was published.
            ValueError: this version or a higher one was published before, or the manifest or a file
                would be refused on reading.
            OSError: storage failed. Nothing was published, unless an answer was lost on the way:
                ``next_version`` tells.
        """
        ...

    def read_manifest(self, version: int) -> Manifest:
        """The manifest alone, checked.

        Raises:
            BundleError: there is no such version, or its manifest is damaged.
        """
        ...

    def read(self, version: int, expected: ExpectedTensors | None = None) -> Bundle:
        """Read a version into memory and check all of it.

        Args:
            version: the version.
            expected: tensors that ``drafter.safetensors`` must hold, and no others.

        Raises:
            BundleError: names what was found.
        """
        ...

    def read_into(
        self, host: HostBuffer, version: int, expected: ExpectedTensors | None = None
    ) -> BundleInBuffer:
        """Like ``read``, but into memory that is reused from version to version.

        Meant for a thread beside others that cannot wait: it allocates no large memory once
        ``host`` has grown, and holds the interpreter lock only briefly.

        Raises:
            BundleError: as ``read``.
        """
        ...

    def change_mark(self, version: int) -> Hashable:
        """A value that changes whenever the stored version does. Cheap; no content is read.

        Raises:
            OSError: storage failed.
        """
        ...

    def watch(self, notify: Callable[[], None]) -> Callable[[], None]:
        """Call ``notify`` on a thread of the store soon after a version was published.

        A hint that saves waiting for the next look, not a promise: look from time to time anyway.
        Does nothing in a store that cannot tell.

        Returns:
            Ends it.
        """
        return lambda: None

    def newest_sound(self) -> tuple[Bundle, list[str]]:
        """The newest version that is undamaged and was not rolled back, and why newer ones were
        passed over.

        Raises:
            ValueError: there is none.
        """
        denied = self.read_denied()
        problems = []
        for version in reversed(self.versions()):
            if version in denied:
                problems.append(f"version {version} was rolled back.")
                continue
            try:
                return self.read(version), problems
            except BundleError as error:
                problems.append(str(error))
        reasons = " ".join(problems) or "it is empty"
        raise ValueError(f"no version in {self.location} can be used: {reasons}")

    def read_denied(self) -> set[int]:
        """Versions that a server rolled back from; nobody starts with them.

        Raises:
            ValueError: the stored list is damaged.
        """
        ...

    def write_denied(self, denied: Collection[int]) -> None:
        """Replace the list that ``read_denied`` returns."""
        ...

    def mark_in_use(self, producer: str, in_use: Collection[int]) -> None:
        """Protect the versions that a server uses, or may roll back to, from ``prune``.

        Call it before reading a version, and at least hourly after that: a store that outlives its
        servers drops marks that have not been renewed for a day.

        Raises:
            ValueError: ``producer`` is not a plain name.
        """
        ...

    def unmark_in_use(self, producer: str) -> None:
        """Remove a server's mark; called when it stops."""
        ...

    def prune(self, keep: int, in_use: Collection[int] = ()) -> list[int]:
        """Remove old versions, and return them.

        The newest ``keep`` stay, and so do versions ``in_use`` or marked by servers, with their
        parents, and version 0.

        Raises:
            ValueError: ``keep`` is below 1.
        """
        ...


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

    def keep_unreadable(self, name: str, payload: Payload) -> None:
        """Keep a record that could not be decoded, for inspection. Best effort: never raises, and
        drops it once ``MAX_UNREADABLE_BYTES`` are kept."""
        ...

    def open_weights(self) -> WeightsStore: ...

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
