"""A writer to a service whose records wait on the disk, not in memory alone, until it has them.

Every record is appended to a log of its own, in the format of ``segment_writer.py``, and handed to
the service's writer as far as that has room; the rest is read back when it has. What the service
has stored is deleted. Over its limit the spool drops its oldest records and counts them. What a
killed process leaves is sent by the next one, or by another that uses the same folder; what was
stored already but not noted yet is sent twice, and recognised by readers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from buffer.counts import WriterCounts
from buffer.interface import Payload, TraceLimits, TraceWriter, check_record
from buffer.segment_reader import Position
from buffer.segment_writer import SegmentWriter
from buffer.spool_folder import SpoolFolder, left_behind
from configs.logs import Lasting

log = logging.getLogger(__name__)

WINDOW_BYTES = 8 << 20
"""What the service's writer may hold in memory; at least one record, whatever its size."""
_SEGMENTS = 16  # of a full spool: whole segments are dropped
_LEAST_SEGMENT = 4096
_SAVE_S = 0.5
_LOOK_S = 5.0
_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Handed:
    """A record that the service's writer has, and has not stored yet."""

    num_bytes: int
    folder: SpoolFolder | None
    """``None``: the disk refused it, so that it is in memory alone."""
    position: Position | None
    """Behind it, in its folder."""


class DiskSpool(TraceWriter):
    """Appends to a spool on the disk, from which a service's writer is fed."""

    def __init__(
        self,
        inner: TraceWriter,
        root: Path,
        limits: TraceLimits,
        max_bytes: int,
        *,
        window_bytes: int = WINDOW_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            inner: of the service; it must store records in order. Used by nobody else from now on.
            root: folder of the spool; processes may share it.
            limits: age at which records are dropped, and how often the disk is synced.
            max_bytes: what the spool may hold on the disk.
            window_bytes: what ``inner`` may hold, less than it drops anything at.
            clock: unix time, seconds.
        """
        self._most_held = limits.max_bytes
        """What the service holds at most; ``None``: its writer alone knows."""
        segment_bytes = max(_LEAST_SEGMENT, min(limits.segment_bytes, max_bytes // _SEGMENTS))
        limits = replace(limits, segment_bytes=segment_bytes, max_bytes=max_bytes)
        self._inner = inner
        self._root = root
        self._window_bytes = window_bytes
        self._disk = SegmentWriter(root, limits, clock=clock)
        self._own = SpoolFolder(root, self._disk.name)
        self._others: list[SpoolFolder] = []
        """Left by dead processes."""
        self._handed: deque[_Handed] = deque()
        self._handed_bytes = 0
        self._noted = inner.counts.durable
        """Records of ``inner`` that are known to be stored."""
        self._tally = _Tally()
        self._is_unwanted: Callable[[Payload], bool] | None = None
        """Tells records of deleted tenants."""
        self._problem = Lasting()
        """Why the spool cannot be read."""
        self._save_at_s = self._look_at_s = 0.0

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def counts(self) -> WriterCounts:
        t, below = self._tally, self._inner.counts
        dropped, deleted = t.dropped + self._own.num_lost, t.deleted + self._own.num_deleted
        durable, doubtful, left = t.durable, t.doubtful, t.left
        appended = t.appended  # last: another thread may ask, and none is owed to it then
        return WriterCounts(
            appended=appended,
            durable=durable,
            pending=appended - durable - doubtful - dropped - deleted - left,
            doubtful=doubtful,
            evicted_records=below.evicted_records,
            evicted_bytes=below.evicted_bytes,
            dropped=dropped,
            deleted=deleted,
            left=left,
            recovered=t.recovered,
            unrecovered=t.unrecovered + sum(one.num_unsent for one in self._others),
        )

    def append(self, payload: Payload) -> int:
        """Take one record; it is on the disk, or in memory where the disk refuses it."""
        if self._most_held is not None:
            check_record(len(payload), self._most_held)
        is_level = self._own.position.number == self._disk.position.number
        try:
            self._disk.append(payload)
        except OSError:
            self._note_folder()
            if not self._has_room(len(payload)):
                raise
            self._tally.appended += 1
            self._give(payload, None)
            return self._tally.appended - 1
        self._tally.appended += 1
        self._note_folder(newest=1)
        if (evicted := self._disk.counts.evicted_records) > self._tally.evicted:
            self._tally.evicted = evicted
            self._own.notice_evicted()
        if is_level and self._has_room(len(payload)):
            # Nothing older waits: this one need not be read back.
            self._own.pass_over(self._disk.position)
            self._give(payload, self._own)
        return self._tally.appended - 1

    def sync(self) -> range:
        """Hand over and store what there is, as far as the service's memory has room for it at a
        time. The disk is synced first, so that a failing service costs nothing."""
        before = self._tally.durable
        with contextlib.suppress(OSError):
            self._disk.sync()
        self._send(math.inf)
        self._save()
        return range(before, self._tally.durable)

    def _send(self, until_s: float) -> None:
        self._feed()
        while self._handed:
            self._inner.sync()
            self._note_stored()
            self._note_given_up()
            if time.monotonic() < until_s:
                self._feed()

    def tend(self) -> range:
        before = self._tally.durable
        problem: OSError | None = None
        try:
            self._disk.tend()
            self._note_folder()
            self._own.notice_evicted()  # another process that shares the spool evicts, too
        except OSError as error:  # the service may work all the same
            problem = error
        self._look()
        try:
            self._feed()
            self._inner.tend()
        finally:
            self._note_stored()
            self._note_given_up()
            self._feed()
            self._save_if_due()
        if problem is not None:
            raise problem
        return range(before, self._tally.durable)

    def remove(self, is_unwanted: Callable[[Payload], bool]) -> int:
        """Overwrite them on the disk. What the service's writer has of them arrives, and readers
        know what to pass over; what other dead processes left is looked at when it is taken over.
        """
        self._is_unwanted = is_unwanted
        with contextlib.suppress(FileNotFoundError):  # somebody deleted the folder
            return sum(one.blank(is_unwanted) for one in (self._own, *self._others))
        return 0

    def close(self) -> None:
        """Send what can be sent in a few seconds; the next process sends the rest."""
        until_s = time.monotonic() + _CLOSE_S
        try:
            with contextlib.suppress(OSError):
                self._disk.sync()
            self._send(until_s)
        finally:
            try:
                self._inner.close()
            finally:
                self._note_stored()
                self._close_disk()

    # ---- the disk ------------------------------------------------------------------------------

    def _note_folder(self, newest: int = 0) -> None:
        """After somebody deleted the folder, what waited there is lost and counted. Records that
        follow are in a new one.

        Args:
            newest: records that were appended to the new folder already.
        """
        if self._disk.name == self._own.name and not self._disk.was_deleted:
            return
        t, lost = self._tally, self._own.num_lost
        t.dropped += lost
        t.deleted += self._own.num_deleted
        known = t.durable + t.dropped + t.deleted + self._num_own_handed + newest
        t.dropped += max(0, t.appended - known)
        self._own = SpoolFolder(self._root, self._disk.name)
        if self._disk.was_deleted:
            self._own.pass_over(self._disk.position)

    @property
    def _num_own_handed(self) -> int:
        return sum(one.folder is None or one.folder.is_own for one in self._handed)

    def _close_disk(self) -> None:
        self._note_folder()
        t = self._tally
        t.doubtful += sum(one.folder is None for one in self._handed)
        if self._disk.was_deleted:  # what had been handed over was there, too
            t.doubtful += sum(one.folder is not None and one.folder.is_own for one in self._handed)
        self._save()
        own = self._own
        t.left = t.appended - t.durable - t.doubtful - t.dropped - t.deleted
        t.left -= own.num_lost + own.num_deleted
        with contextlib.suppress(OSError):
            self._disk.close()
        for folder in self._others:
            folder.release()
        if not t.left:
            self._own.delete()
        self._handed.clear()

    # ---- to the service ------------------------------------------------------------------------

    def _has_room(self, num_bytes: int) -> bool:
        return not self._handed or self._handed_bytes + num_bytes <= self._window_bytes

    def _feed(self) -> None:
        """Hand over what waits on the disk, as far as there is room; our own records first."""
        for folder in (self._own, *self._others):
            while not folder.is_read and self._has_room(self._largest_read):
                payload = self._next_of(folder)
                if payload is None:
                    break
                self._give(payload, folder)

    def _next_of(self, folder: SpoolFolder) -> Payload | None:
        """A disk that cannot be read at present stops nobody; it is tried again."""
        try:
            payload = folder.next_record()
        except OSError as error:
            if self._problem.is_new(str(error)):
                log.warning("the spool cannot be read (%s); it is tried again", error)
            return None
        self._problem.is_new(None)
        return payload

    @property
    def _largest_read(self) -> int:
        """A guess at the size of the next record, which is read before its size is known."""
        return self._handed[-1].num_bytes if self._handed else 0

    def _give(self, payload: Payload, folder: SpoolFolder | None) -> None:
        """Hand a record to the service's writer. One that it refuses for good is counted."""
        try:
            self._inner.append(payload)
        except OSError as error:
            log.warning("a record of the spool cannot be sent: %s", error)
            if folder is None or folder.is_own:
                self._tally.dropped += 1
            else:
                self._tally.unrecovered += 1
            return
        position = None if folder is None else folder.position
        self._handed.append(_Handed(len(payload), folder, position))
        self._handed_bytes += len(payload)

    def _note_stored(self) -> None:
        """Follow the service's writer, which stores records in order."""
        stored = self._inner.counts.durable
        for _ in range(stored - self._noted):
            is_own = self._take_back()
            self._tally.durable += is_own
            self._tally.recovered += not is_own
        self._noted = stored

    def _note_given_up(self) -> None:
        """Count what the service's writer, which has nothing left to do, has not stored."""
        while self._handed and not self._inner.counts.pending:
            is_own = self._take_back()
            self._tally.dropped += is_own
            self._tally.unrecovered += not is_own

    def _take_back(self) -> bool:
        """The oldest record that was handed over is done with; whether it is our own."""
        one = self._handed.popleft()
        self._handed_bytes -= one.num_bytes
        if one.folder is None or one.position is None:
            return True
        one.folder.sent(one.position)
        return one.folder.is_own

    # ---- housekeeping --------------------------------------------------------------------------

    def _look(self) -> None:
        """Take over what dead processes have left."""
        if time.monotonic() < self._look_at_s:
            return
        self._look_at_s = time.monotonic() + _LOOK_S
        known = {self._own.name, *(one.name for one in self._others)}
        for folder in left_behind(self._root, known):
            log.info("the spool of a process that ended, %s, is sent now", folder.name)
            if self._is_unwanted is not None:
                folder.blank(self._is_unwanted)
            self._others.append(folder)

    def _save_if_due(self) -> None:
        if time.monotonic() >= self._save_at_s:
            self._save()

    def _save(self) -> None:
        """Note what was sent, and delete it. Where the disk fails, the next process may send some
        of it again."""
        self._save_at_s = time.monotonic() + _SAVE_S
        try:
            self._note_sent()
        except OSError as error:
            if self._problem.is_new(str(error)):
                log.warning("the spool does not note what was sent (%s); tried again", error)

    def _note_sent(self) -> None:
        self._own.save()
        self._disk.release(self._own.sent_segments())
        for folder in list(self._others):
            folder.save()
            folder.delete_sent()
            if folder.is_read and folder.is_sent and folder.delete():
                self._tally.unrecovered += folder.num_unsent
                self._others.remove(folder)


@dataclass(slots=True)
class _Tally:
    """Records of this process by outcome."""

    appended: int = 0
    durable: int = 0
    doubtful: int = 0
    dropped: int = 0
    """In folders that somebody deleted; what the present folder has lost comes on top."""
    deleted: int = 0
    """Likewise."""
    left: int = 0
    evicted: int = 0
    """From the spool, sent ones included, when that was last looked at."""
    recovered: int = 0
    """Of dead processes."""
    unrecovered: int = 0
    """Likewise; lost before they could be sent."""
