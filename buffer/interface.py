"""What every buffer backend offers: a trace writer, a record reader and a weights store.

Traces are delivered at least once: a record that ``sync`` acknowledged reaches every reader unless
it was evicted first, and every loss is counted. Readers keep their own offsets. Versions of the
weights are published whole or not at all, and a version number is never reused.

To add a backend, subclass ``Backend``, ``TraceWriter``, ``RecordReader`` and ``WeightsStore`` in
one file and name it in the catalog, ``backends.py``.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from buffer.bundles import Bundle, BundleError, BundleInBuffer, ExpectedTensors, HostBuffer
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


@dataclass(frozen=True, slots=True)
class WriterCounts:
    """Records of one writer by outcome: appended = durable + pending + doubtful."""

    appended: int
    durable: int
    """Acknowledged: stored for good, until evicted."""
    pending: int
    """Written but not acknowledged yet."""
    doubtful: int
    """Never acknowledged because the disk failed to sync; they may be readable or lost."""
    evicted_records: int
    """Evicted by this writer to keep the limits, whoever wrote them."""
    evicted_bytes: int


class TraceWriter(Protocol):
    """Appends records to the log. Used by one thread; never waits for a reader."""

    @property
    def name(self) -> str:
        """Name of this writer, unique within the buffer."""
        ...

    @property
    def counts(self) -> WriterCounts: ...

    def append(self, payload: Payload) -> int:
        """Write one record; ``sync`` or ``tend`` acknowledges it later.

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
            OSError: storage failed; the pending records are counted ``doubtful``.
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
        """Sync, then tell readers that this writer is done."""
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


@dataclass(frozen=True, slots=True)
class ReaderCounts:
    """Records by outcome: written = read + damaged + evicted_unread + not read yet."""

    read: int = 0
    damaged: int = 0
    """Records that were written whole but cannot be read any more."""
    torn: int = 0
    """Writers that died within their last record, which therefore was never acknowledged."""
    evicted_unread: int = 0
    """Records evicted before this reader reached them."""


class RecordReader(Protocol):
    """Follows all writers of a buffer from its own offsets; never blocks, never writes."""

    @property
    def counts(self) -> ReaderCounts:
        """Counts since this reader was opened."""
        ...

    def offsets(self) -> dict[str, Any]:
        """Offsets from which ``open_record_reader`` continues; JSON can hold them."""
        ...

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        """New records since the last call, in order within each writer; empty if there are none.

        Stops early once ``max_bytes`` are reached.

        Raises:
            OSError: storage failed.
        """
        ...


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

    def publish(self, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
        """Make a new version visible, whole or not at all.

        Args:
            manifest: everything but ``files``, which is filled in here.
            files: name -> content; ``drafter.safetensors`` must be among them.

        Returns:
            The manifest as published.

        Raises:
            ValueError: this version or a higher one was published before, or the manifest or a file
                would be refused on reading.
            OSError: storage failed; nothing was published.
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

    def open_trace_writer(self, limits: TraceLimits) -> TraceWriter:
        """A new writer for this process.

        Raises:
            OSError: storage failed.
        """
        ...

    def open_record_reader(self, offsets: Offsets | None = None) -> RecordReader:
        """A reader that continues from ``offsets``, or begins with the oldest record.

        Raises:
            ValueError: ``offsets`` are not those of a reader of this backend.
        """
        ...

    def keep_unreadable(self, name: str, payload: Payload) -> None:
        """Keep a record that could not be decoded, for inspection. Best effort: never raises, and
        drops it once ``MAX_UNREADABLE_BYTES`` are kept."""
        ...

    def open_weights(self) -> WeightsStore: ...

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        """State of the stored records for ``buffer inspect``, without changing anything.

        Args:
            limits: what the settings allow the records to take.
        """
        ...
