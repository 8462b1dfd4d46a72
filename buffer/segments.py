"""The embedded log: traces on the local disk, no service to run.

Each server process appends to segment files in a folder of its own; any number of readers follow,
each with its own place, which it keeps itself. A record is acknowledged once ``sync`` returned:
from then on neither kill -9 nor power loss takes it. See ``layout.py`` for the folders,
``frames.py`` for one record, ``eviction.py`` for how old segments leave.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from buffer.eviction import Evicted, Limits, evict
from buffer.files import sync_folder
from buffer.frames import (
    HEAD,
    MAX_PAYLOAD_BYTES,
    claimed_end,
    next_frame,
    pack_head,
    scan,
)
from buffer.layout import (
    LOCK,
    is_live,
    read_tombstone,
    segment_numbers,
    segment_path,
    writer_names,
)

_ROLLS_PER_TTL = 8  # a segment is closed at this part of the TTL, so records leave not much early
_MAX_EVICT_INTERVAL_S = 10.0
_MAX_READ_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class WriterCounts:
    """What became of the records of one writer: appended = durable + pending + doubtful."""

    appended: int
    durable: int
    """Acknowledged: on the disk for good."""
    pending: int
    """Written, not yet acknowledged; a killed process keeps them, a power cut does not."""
    doubtful: int
    """Never acknowledged because the disk failed to sync; they may be readable or lost."""
    evicted_records: int
    """Deleted by this writer to keep the limits, from any writer's folder."""
    evicted_bytes: int


class SegmentWriter:
    """Appends records to the log. One thread uses it; nothing here waits for a reader."""

    def __init__(
        self,
        root: Path,
        *,
        segment_bytes: int,
        max_bytes: int,
        ttl_s: float,
        sync_interval_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make this process's folder under ``root``.

        Args:
            root: folder of the log, made if missing.
            segment_bytes: size at which a segment is closed and the next begun.
            max_bytes: bytes of all segments of all writers; the oldest leave first.
            ttl_s: age at which records leave, seconds.
            sync_interval_s: longest time a record waits in ``tend`` for its sync, seconds.
            clock: unix time, seconds.

        Raises:
            ValueError: ``max_bytes`` is less than two segments.
            OSError: of the disk.
        """
        if max_bytes < 2 * segment_bytes:
            raise ValueError(
                f"max_bytes={max_bytes} holds less than two segments of "
                f"segment_bytes={segment_bytes}; raise max_bytes or lower segment_bytes"
            )
        self._root = root
        self._limits = Limits(segment_bytes, max_bytes, ttl_s)
        self._sync_interval_s = sync_interval_s
        self._clock = clock
        self._folder = _make_folder(root, clock)
        self._lock = _take_lock(self._folder)
        self._descriptor: int | None = None
        self._segment = -1
        self._size = 0
        self._begun_s = 0.0
        self._appended = self._durable = self._pending = self._doubtful = 0
        self._pending_since = 0.0
        self._evicted = Evicted()
        self._next_evict = 0.0

    @property
    def name(self) -> str:
        """Name of this writer's folder."""
        return self._folder.name

    @property
    def counts(self) -> WriterCounts:
        return WriterCounts(
            self._appended,
            self._durable,
            self._pending,
            self._doubtful,
            self._evicted.records,
            self._evicted.num_bytes,
        )

    def append(self, payload: bytes) -> int:
        """Write one record without waiting for the disk; ``sync`` acknowledges it.

        Returns:
            The record's running number in this writer, from 0.

        Raises:
            OSError: the disk is full or fails, or the record is too large (EFBIG). The record was
                not written, whatever of it was is cut off again, and the writer can be used on.
        """
        num_bytes = HEAD.size + len(payload)
        if len(payload) > MAX_PAYLOAD_BYTES or num_bytes > self._limits.max_bytes // 2:
            raise OSError(
                errno.EFBIG,
                f"a record of {num_bytes} bytes is over half of max_bytes={self._limits.max_bytes}",
            )
        if self._descriptor is not None and self._size + num_bytes > self._limits.segment_bytes:
            self._close_segment()
        if self._descriptor is None:
            self._begin_segment(num_bytes)
        self._write(pack_head(payload, self._appended, int(self._clock() * 1000)), payload)
        self._size += num_bytes
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending += 1
        self._appended += 1
        return self._appended - 1

    def sync(self) -> range:
        """Wait until the disk has all that was appended.

        Returns:
            Numbers of the records that are acknowledged by this call.

        Raises:
            OSError: the disk failed. After that the system may have forgotten the data, so these
                records are counted ``doubtful`` for good and the next ones get a new segment.
        """
        if self._descriptor is not None and self._pending:
            try:
                os.fdatasync(self._descriptor)
            except OSError:
                self._abandon_segment()
                raise
        newly = range(self._appended - self._pending, self._appended)
        self._durable += self._pending
        self._pending = 0
        return newly

    def tend(self) -> range:
        """Do what is due: sync, close a segment that grows old, evict. Call it often.

        Returns:
            Numbers of the records that are acknowledged by this call.

        Raises:
            OSError: as ``sync``.
        """
        newly = range(self._appended, self._appended)
        if self._pending and time.monotonic() - self._pending_since >= self._sync_interval_s:
            newly = self.sync()
        if time.monotonic() >= self._next_evict:
            self._close_if_old()
            self._evict(need_bytes=0)
        return newly

    def close(self) -> None:
        """Sync, close, and tell readers that no more comes."""
        try:
            self._close_segment()
        finally:
            os.close(self._lock)

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _begin_segment(self, num_bytes: int) -> None:
        self._evict(need_bytes=max(num_bytes, self._limits.segment_bytes))
        self._segment += 1
        path = segment_path(self._folder, self._segment)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._size = 0
        self._begun_s = self._clock()
        try:
            sync_folder(self._folder)
        except OSError:
            self._abandon_segment()
            raise

    def _write(self, head: bytes, payload: bytes) -> None:
        assert self._descriptor is not None
        try:
            written = os.writev(self._descriptor, [head, payload])
            rest = (
                memoryview(head + payload)[written:] if written < len(head) + len(payload) else b""
            )
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            self._cut_off_partial_record()
            raise

    def _cut_off_partial_record(self) -> None:
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError:
            self._abandon_segment()

    def _close_segment(self) -> None:
        self.sync()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _abandon_segment(self) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None
        self._doubtful += self._pending
        self._pending = 0

    def _close_if_old(self) -> None:
        age_s = self._clock() - self._begun_s
        if self._descriptor is not None and age_s >= self._limits.ttl_s / _ROLLS_PER_TTL:
            self._close_segment()

    def _evict(self, need_bytes: int) -> None:
        interval_s = min(_MAX_EVICT_INTERVAL_S, self._limits.ttl_s / _ROLLS_PER_TTL)
        self._next_evict = time.monotonic() + interval_s
        self._evicted += evict(
            self._root,
            self._limits,
            self._clock(),
            own=self._folder,
            own_open=None if self._descriptor is None else self._segment,
            need_bytes=need_bytes,
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One record as a reader gets it."""

    payload: bytes
    writer: str
    segment: int
    offset: int
    """Where its frame begins in the segment."""


@dataclass(frozen=True, slots=True)
class ReaderCounts:
    """What became of the records: written = read + damaged + evicted_unread + not read yet."""

    read: int = 0
    damaged: int = 0
    """Records that were there and could not be read."""
    torn: int = 0
    """Dead writers whose last record was only half written, and so never acknowledged."""
    evicted_unread: int = 0
    """Records that left by age or bytes before this reader came to them."""


@dataclass(frozen=True, slots=True)
class _Place:
    """How far a reader is with one writer."""

    segment: int = 0
    offset: int = 0
    number: int = 0
    """Number of the record that comes next."""


class SegmentReader:
    """Follows all writers of a log, from a place of its own; never blocks, never writes."""

    def __init__(self, root: Path, offsets: Mapping[str, Any] | None = None) -> None:
        """Begin at ``offsets``, as an earlier reader's ``offsets()`` returned them.

        Raises:
            ValueError: ``offsets`` are not what ``offsets()`` returns.
        """
        self._root = root
        self._places = {name: _place_of(name, place) for name, place in (offsets or {}).items()}
        self._finished: set[str] = set()
        self._turn = 0
        self._read = self._damaged = self._torn = self._evicted_unread = 0

    @property
    def counts(self) -> ReaderCounts:
        """Counts since this reader was made."""
        return ReaderCounts(self._read, self._damaged, self._torn, self._evicted_unread)

    def offsets(self) -> dict[str, dict[str, int]]:
        """The place in every writer's folder; JSON keeps it."""
        return {name: asdict(place) for name, place in self._places.items()}

    def read(self, max_records: int, max_bytes: int = _MAX_READ_BYTES) -> list[Record]:
        """Whole records that came since the last call, in order within each writer.

        Stops early once ``max_bytes`` are reached. Empty when nothing new is there.

        Raises:
            OSError: of the disk.
        """
        names = writer_names(self._root)
        for name in self._places.keys() - set(names):
            del self._places[name]
        batch = _Batch(max_records, max_bytes)
        self._turn += 1  # another writer comes first each time, so that none is starved
        for index in range(len(names)):
            name = names[(self._turn + index) % len(names)]
            if name not in self._finished:
                self._read_writer(name, batch)
        self._read += len(batch.records)
        return batch.records

    def _read_writer(self, name: str, batch: _Batch) -> None:
        while not batch.is_full:
            segment = self._places.setdefault(name, _Place()).segment
            # Asked before the file is read: what a closed segment holds then is all it ever will.
            is_closed = self._is_closed(name, segment)
            self._read_segment(name, batch, is_closed)
            if batch.is_full or not is_closed or not self._enter_next_segment(name):
                return

    def _read_segment(self, name: str, batch: _Batch, is_closed: bool) -> None:
        place = self._places[name]
        try:
            descriptor = os.open(segment_path(self._root / name, place.segment), os.O_RDONLY)
        except FileNotFoundError:  # evicted, or not begun yet
            self._count_evicted(name)
            return
        try:
            size = os.fstat(descriptor).st_size
            while not batch.is_full and (frame := next_frame(descriptor, place.offset, size)):
                batch.add(Record(frame.payload, name, place.segment, frame.start))
                self._damaged += max(0, frame.number - place.number)
                place = _Place(place.segment, frame.end, frame.number + 1)
                self._places[name] = place
            if is_closed and not batch.is_full:
                self._pass_tail(name, descriptor, size)
        finally:
            os.close(descriptor)

    def _pass_tail(self, name: str, descriptor: int, size: int) -> None:
        """Step over what follows the last sound record of a closed segment.

        In front of a next segment the gap in the numbers tells what was lost here; behind the last
        one a whole head tells a damaged record from one that its writer did not live to finish.
        """
        place = self._places[name]
        num_damaged = 0
        if place.offset < size and not self._later_segments(name, place.segment):
            end = claimed_end(descriptor, place.offset)
            num_damaged = int(end is not None and end <= size)
            self._torn += 1 - num_damaged
        self._damaged += num_damaged
        self._places[name] = _Place(place.segment, size, place.number + num_damaged)

    def _is_closed(self, name: str, segment: int) -> bool:
        return bool(self._later_segments(name, segment)) or not is_live(self._root / name)

    def _later_segments(self, name: str, segment: int) -> list[int]:
        return [number for number in segment_numbers(self._root / name) if number > segment]

    def _enter_next_segment(self, name: str) -> bool:
        """Go to the next segment that is there; False if none is."""
        self._count_evicted(name)
        place = self._places[name]
        is_dead = not is_live(self._root / name)  # asked first: the dead begin no segment
        later = self._later_segments(name, place.segment)
        if later:
            self._places[name] = _Place(later[0], 0, place.number)
        elif is_dead and place.number:  # without a record its lock may be about to be taken
            self._finished.add(name)
        return bool(later)

    def _count_evicted(self, name: str) -> None:
        place = self._places[name]
        tombstone = read_tombstone(self._root / name)
        if tombstone is not None and tombstone.next_number > place.number:
            self._evicted_unread += tombstone.next_number - place.number
            self._places[name] = _Place(place.segment, place.offset, tombstone.next_number)


class _Batch:
    """Records of one ``read``, up to its limits."""

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self.records: list[Record] = []
        self._max_records = max_records
        self._bytes_left = max_bytes

    def add(self, record: Record) -> None:
        self.records.append(record)
        self._bytes_left -= len(record.payload)

    @property
    def is_full(self) -> bool:
        return len(self.records) >= self._max_records or self._bytes_left <= 0


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """What one segment file holds."""

    writer: str
    segment: int
    records: int
    """Sound records."""
    num_bytes: int
    """Size of the file."""
    torn_bytes: int
    """Bytes behind the last sound record; in a live segment a record may be on its way."""
    damaged: int
    """Records that were there and cannot be read."""
    live: bool
    """Its writer still runs."""


def recover(root: Path) -> list[SegmentReport]:
    """Look at every segment of a log, from its first byte to its last, without a change to it.

    Nothing needs repair before reading: readers step over what is damaged or torn.
    """
    reports = []
    for folder in (root / name for name in writer_names(root)):
        tombstone = read_tombstone(folder)
        number = 0 if tombstone is None else tombstone.next_number
        numbers = segment_numbers(folder)
        live = is_live(folder)
        for segment in numbers:
            is_last = segment == numbers[-1]
            report, number = _report(folder, segment, number, live=live, is_last=is_last)
            reports.append(report)
    return reports


def _report(
    folder: Path, segment: int, number: int, *, live: bool, is_last: bool
) -> tuple[SegmentReport, int]:
    """Report of one segment, and the number of the record that follows it."""
    records = damaged = end = 0
    descriptor = os.open(segment_path(folder, segment), os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        for frame in scan(descriptor, size):
            damaged += max(0, frame.number - number)
            records, end, number = records + 1, frame.end, frame.number + 1
        claimed = claimed_end(descriptor, end) if is_last else None
    finally:
        os.close(descriptor)
    if claimed is not None and claimed <= size:
        damaged, number = damaged + 1, number + 1
    report = SegmentReport(
        folder.name, segment, records, size, size - end, damaged, live and is_last
    )
    return report, number


def _make_folder(root: Path, clock: Callable[[], float]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    boot_ms = int(clock() * 1000)
    while True:  # a second writer of one process within a millisecond takes the next
        folder = root / f"w{os.getpid()}-{boot_ms}"
        try:
            folder.mkdir()
        except FileExistsError:
            boot_ms += 1
            continue
        sync_folder(root)
        return folder


def _take_lock(folder: Path) -> int:
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _place_of(name: str, place: Any) -> _Place:
    match place:
        case {"segment": int(segment), "offset": int(offset), "number": int(number)}:
            return _Place(segment, offset, number)
    raise ValueError(f"offsets of {name!r} must hold segment, offset and number, got {place!r}")
