"""Writes the embedded log: append-only segment files in a folder per writer.

A record is acknowledged once ``sync`` has returned; from then on neither kill -9 nor a power cut
loses it. See ``layout.py`` for the folders, ``frames.py`` for the format of a record and
``eviction.py`` for how old segments are deleted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from buffer.counts import WriterCounts
from buffer.eviction import Contents, Evictor
from buffer.files import sync_folder
from buffer.frames import HEAD, MAX_PAYLOAD_BYTES, pack_head
from buffer.interface import Payload, RecordTooLargeError, TraceLimits, TraceWriter, check_record
from buffer.layout import segment_path
from buffer.segment_reader import Position
from buffer.writer_folder import OpenSegment, WriterFolder

log = logging.getLogger(__name__)

_ROLLS_PER_TTL = 8  # a segment is closed after TTL / 8, so records leave only a little early
_MAX_EVICT_INTERVAL_S = 10.0
_MOST_TAKEN = 100
"""Numbers of segments that are tried one after another."""
_MAX_GROUP = 256  # records of one write; the system takes 1,024 pieces, and a record is two


class SegmentWriter(TraceWriter):
    """Appends records to segment files in a folder of its own."""

    def __init__(
        self, root: Path, limits: TraceLimits, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Create this writer's folder under ``root``. If the disk refuses, each ``append`` tries
        again.

        Args:
            root: folder of the log, created if missing.
            limits: what the log may hold.
            clock: unix time, seconds.
        """
        self._limits = limits
        self._clock = clock
        self._folder = WriterFolder(root, clock)
        self._open: OpenSegment | None = None
        self._next_segment = 0
        self._first_here = 0
        """Number of the first record in this folder among all that were appended."""
        self._appended = self._durable = self._doubtful = 0
        self._missing = 0
        """Durable records of segments that somebody deleted while they were open."""
        self._said_missing = 0
        self._pending_since = 0.0
        self._evictor = Evictor(root, limits, self._folder.path)
        self._next_evict = 0.0
        with contextlib.suppress(OSError):
            self._make_folder()

    @property
    def name(self) -> str:
        """Name of this writer's folder."""
        return self._folder.path.name

    @property
    def counts(self) -> WriterCounts:
        durable, doubtful = self._durable, self._doubtful
        appended = self._appended  # last: another thread may ask, and none is owed to it then
        return WriterCounts(
            appended,
            durable,
            appended - durable - doubtful,
            doubtful,
            self._evictor.evicted.records,
            self._evictor.evicted.num_bytes,
            missing=self._missing + self._evictor.missing,
        )

    @property
    def _pending(self) -> int:
        return self._appended - self._durable - self._doubtful

    @property
    def was_deleted(self) -> bool:
        """Somebody has deleted the folder, and nothing was appended since."""
        return self._folder.was_deleted

    @property
    def position(self) -> Position:
        """Behind the last record, as a reader of this folder alone counts it."""
        number = self._appended - self._first_here
        if self._open is None:
            return Position(self._next_segment, 0, number)
        return Position(self._open.number, self._open.size, number)

    def release(self, segments: Sequence[int]) -> None:
        """Delete closed segments of this writer that nobody needs any more."""
        self._evictor.release(segments)

    def append(self, payload: Payload) -> int:
        """Write one record without waiting for the disk; whatever a failing disk wrote of it is cut
        off again."""
        self._check(payload)
        self._notice_deletion()
        if self._open is not None and not self._fits(HEAD.size + len(payload)):
            self._close_segment()
        self._append_group([payload])
        return self._appended - 1

    def append_all(self, payloads: Sequence[Payload]) -> list[OSError]:
        """As ``append`` does each, but with one write for as many as fit the segment."""
        errors: list[OSError] = []
        group: list[Payload] = []
        num_bytes = 0
        for payload in payloads:
            size = HEAD.size + len(payload)
            if group and (len(group) == _MAX_GROUP or not self._fits(num_bytes + size)):
                errors += self._try_group(group)
                group, num_bytes = [], 0
            group.append(payload)
            num_bytes += size
        return errors + self._try_group(group)

    def _try_group(self, group: list[Payload]) -> list[OSError]:
        """Write a group at once or, where that fails, one by one, to find those that fail."""
        try:
            if len(group) > 1:
                for payload in group:
                    self._check(payload)
                self._append_group(group)
                return []
        except OSError:
            pass
        return super().append_all(group)

    def _check(self, payload: Payload) -> None:
        check_record(HEAD.size + len(payload), self._evictor.max_bytes)
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise RecordTooLargeError(f"a record holds at most {MAX_PAYLOAD_BYTES} bytes")

    def _fits(self, num_bytes: int) -> bool:
        """Whether so many more bytes belong in the open segment or, if none is, in the next."""
        open_bytes = 0 if self._open is None else self._open.size
        return open_bytes + num_bytes <= self._limits.segment_bytes

    def _append_group(self, payloads: Sequence[Payload]) -> None:
        num_bytes = sum(HEAD.size + len(payload) for payload in payloads)
        self._notice_deletion()
        segment = self._open or self._begin_segment(num_bytes)
        now_ms = int(self._clock() * 1000)
        pieces: list[Payload] = []
        for number, payload in enumerate(payloads, start=self._appended - self._first_here):
            pieces += [pack_head(payload, number, now_ms), payload]
        self._write(segment, pieces)
        segment.size += num_bytes
        if not self._pending:
            self._pending_since = time.monotonic()
        self._appended += len(payloads)

    def sync(self) -> range:
        """Flush everything appended to the disk.

        When the disk fails, the kernel may have dropped the data, and when somebody has deleted the
        segment, nobody will read it: the pending records are counted ``doubtful`` for good, and
        later ones go to a new segment.
        """
        if self._open is not None and self._pending:
            segment = self._open
            try:
                os.fdatasync(segment.descriptor)
            except OSError:
                self._abandon_segment()
                raise
            self._notice_deletion()
            if self._open is None:
                text = "somebody deleted the segment, or cut it off"
                raise FileNotFoundError(errno.ENOENT, text, str(segment.path))
        newly = range(self._appended - self._pending, self._appended)
        self._durable += self._pending
        return newly

    def tend(self) -> range:
        """Sync, close the current segment if it has grown old, and evict, each when due."""
        newly = range(self._appended, self._appended)
        if self._pending and time.monotonic() - self._pending_since >= self._limits.sync_interval_s:
            newly = self.sync()
        if time.monotonic() >= self._next_evict:
            self._notice_deletion()
            if self._folder.is_there:
                self._close_if_old()
                self._evict(need_bytes=0)
        return newly

    def close(self) -> None:
        """Sync, close, and release the lock that tells readers this writer is alive."""
        try:
            self._close_segment()
        finally:
            self._notice_deletion()
            self._folder.release()

    def _make_folder(self) -> None:
        """Make a folder, in which records are numbered from 0."""
        self._folder.make()
        self._next_segment, self._first_here = 0, self._appended
        self._evictor.move_to(self._folder.path)

    def _begin_segment(self, num_bytes: int) -> OpenSegment:
        if not self._folder.is_there:
            self._make_folder()
        self._evict(need_bytes=max(num_bytes, self._limits.segment_bytes))
        segment = self._open = self._begun()
        try:
            sync_folder(self._folder.path)
        except OSError:
            self._abandon_segment()
            raise
        return segment

    def _begun(self) -> OpenSegment:
        """A new file, under the next number that nobody has given to something else."""
        folder = self._folder.path
        for _ in range(_MOST_TAKEN):
            number = self._next_segment
            self._next_segment += 1
            with contextlib.suppress(FileExistsError):
                return OpenSegment.begin(folder, number, self._appended, self._clock())
            log.warning("%s was there before its writer made it", segment_path(folder, number))
        raise FileExistsError(errno.EEXIST, "others have taken the next segments", str(folder))

    def _write(self, segment: OpenSegment, pieces: Sequence[Payload]) -> None:
        try:
            written = os.writev(segment.descriptor, pieces)
            if written < sum(map(len, pieces)):
                rest = memoryview(b"".join(pieces))[written:]
                while rest:
                    rest = rest[os.write(segment.descriptor, rest) :]
        except OSError:
            self._cut_off_partial_record(segment)
            raise

    def _cut_off_partial_record(self, segment: OpenSegment) -> None:
        try:
            os.ftruncate(segment.descriptor, segment.size)
        except OSError:
            self._abandon_segment()

    def _close_segment(self) -> None:
        self.sync()
        if (segment := self._open) is not None:
            contents = Contents(self._appended - segment.first, self._appended - self._first_here)
            self._evictor.note_closed(segment.number, contents)
            os.close(segment.descriptor)
            self._open = None

    def _notice_deletion(self) -> None:
        """Count what somebody has deleted or cut off. What is pending in such a segment is lost;
        more must not follow."""
        if self._open is not None and (left := self._open.num_left()) is not None:
            durable = self._appended - self._pending - self._open.first
            self._missing += max(durable - left, 0)
            self._abandon_segment()
        if self._folder.was_deleted:
            self._evictor.lose_folder()
        if (missing := self.counts.missing) > self._said_missing:
            log.warning(
                "somebody deleted %d acknowledged records from %s; what follows goes to a new %s",
                missing - self._said_missing,
                self._folder.path,
                "folder" if self._folder.was_deleted else "segment",
            )
            self._said_missing = missing

    def _abandon_segment(self) -> None:
        """Leave a segment of which nobody knows what it holds."""
        assert self._open is not None
        os.close(self._open.descriptor)
        self._open = None
        self._doubtful += self._pending

    def _close_if_old(self) -> None:
        if self._open is None:
            return
        if self._clock() - self._open.begun_s >= self._limits.ttl_s / _ROLLS_PER_TTL:
            self._close_segment()

    def _evict(self, need_bytes: int) -> None:
        interval_s = min(_MAX_EVICT_INTERVAL_S, self._limits.ttl_s / _ROLLS_PER_TTL)
        self._next_evict = time.monotonic() + interval_s
        own_open = None if self._open is None else self._open.number
        self._evictor.evict(self._clock(), own_open, need_bytes)
