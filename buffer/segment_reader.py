"""Reads the embedded log: follows the segment files of all writers.

Damage is skipped and counted. A torn record, one that its writer did not live to finish, stays in
its file: readers wait for it while the writer lives and step over it once the writer is dead.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from buffer.blocks import Blocks
from buffer.counts import ReaderCounts
from buffer.distinct_writers import distinct_writers
from buffer.frames import Frame, claimed_end, next_frame
from buffer.interface import MAX_READ_BYTES, Offsets, Record, RecordReader
from buffer.layout import (
    first_number,
    is_live,
    open_segment,
    read_tombstone,
    said_once,
    segment_numbers,
)
from buffer.small_json import is_foreign, is_whole

_MOST_LOOKED_AT = 64
"""Later segments among which one of the writer's own is looked for at a time."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a reader has come with one writer."""

    segment: int = 0
    offset: int = 0
    number: int = 0
    """Number of the next record."""
    lost: int = 0
    """Records before it that were damaged, or evicted before they were read."""
    deleted: int = 0
    """Records before it that were deleted before they were read."""


class SegmentReader(RecordReader):
    """Follows the segment files of all writers under one root."""

    def __init__(self, root: Path, offsets: Mapping[str, Any] | None = None) -> None:
        """Continue from ``offsets``, or begin with the oldest record.

        Raises:
            ValueError: ``offsets`` are not what ``offsets()`` returns.
        """
        self._root = root
        self._positions = {
            name: position_of(name, position) for name, position in (offsets or {}).items()
        }
        self._finished: set[str] = set()
        self._listed: dict[str, list[int]] = {}
        self._followed: dict[str, int] = {}
        """Writer -> a segment that it surely began."""
        self._blocks = Blocks()
        self._turn = 0
        self._read = self._damaged = self._torn = self._evicted_unread = self._deleted = 0

    def commit(self, offsets: Offsets) -> None:
        raise ValueError("a reader without a group has nothing to commit")

    @property
    def counts(self) -> ReaderCounts:
        return ReaderCounts(
            self._read, self._damaged, self._torn, self._evicted_unread, self._deleted
        )

    def offsets(self) -> dict[str, dict[str, int]]:
        return {name: asdict(position) for name, position in self._positions.items()}

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        names = distinct_writers(self._root)
        for name in self._positions.keys() - set(names):
            self.forget(name)
        return self.read_from(names, max_records, max_bytes)

    def position(self, name: str) -> Position:
        """How far it has come with one writer."""
        return self._positions.get(name, Position())

    def move_to(self, name: str, position: Position) -> None:
        """Go on with this writer from there."""
        self.forget(name)
        self._positions[name] = position

    def notice_evicted(self, name: str) -> None:
        """Count what was evicted of this writer before it was read; ``read`` does so, too."""
        self._positions.setdefault(name, Position())
        self._count_evicted(name)

    def forget(self, name: str) -> None:
        """Know nothing of this writer any more."""
        self._positions.pop(name, None)
        self._listed.pop(name, None)
        self._followed.pop(name, None)
        self._finished.discard(name)

    def has_finished(self, name: str) -> bool:
        """All records were read, and there will be no more."""
        return name in self._finished

    def read_from(self, names: list[str], max_records: int, max_bytes: int) -> list[Record]:
        """``read`` these writers alone."""
        batch = _Batch(max_records, max_bytes)
        self._turn += 1  # start with another writer each time, so that none is starved
        for index in range(len(names)):
            name = names[(self._turn + index) % len(names)]
            if name not in self._finished:
                try:
                    self._read_writer(name, batch)
                except OSError as error:
                    if not is_foreign(error):
                        raise
                    # It is tried again with each read; the other writers go on meanwhile.
                    said_once(self._root / name, error.strerror or type(error).__name__)
        self._read += len(batch.records)
        return batch.records

    def _read_writer(self, name: str, batch: _Batch) -> None:
        while not batch.is_full:
            segment = self._positions.setdefault(name, Position()).segment
            # Checked before the file is read: a segment that is closed by then no longer grows.
            is_closed = self._is_closed(name, segment)
            self._read_segment(name, batch, is_closed)
            if batch.is_full or not is_closed or not self._enter_next_segment(name):
                return

    def _read_segment(self, name: str, batch: _Batch, is_closed: bool) -> None:
        position = self._positions[name]
        try:
            descriptor = open_segment(self._root / name, position.segment)
        except FileNotFoundError:  # evicted, or not begun yet
            self._count_evicted(name)
            return
        try:
            size = os.fstat(descriptor).st_size
            while not batch.is_full:
                frame = next_frame(descriptor, position.offset, size, self._blocks.take)
                if frame is None:
                    break
                if not frame.is_deleted:
                    batch.add(Record(frame.payload, name, f"{position.segment:06d}-{frame.start}"))
                position = self._passed(position, frame)
                self._positions[name] = position
            if is_closed and not batch.is_full:
                self._pass_tail(name, descriptor, size)
        finally:
            os.close(descriptor)

    def _passed(self, position: Position, frame: Frame) -> Position:
        """The position behind a frame. Counts what is missing before it, and whether it is."""
        gap = max(0, frame.number - position.number)
        # Lower numbers come again where somebody copied a segment.
        is_deleted = frame.is_deleted and frame.number >= position.number
        self._damaged += gap
        self._deleted += is_deleted
        return Position(
            position.segment,
            frame.end,
            max(position.number, frame.number + 1),
            position.lost + gap,
            position.deleted + is_deleted,
        )

    def _pass_tail(self, name: str, descriptor: int, size: int) -> None:
        """Step over whatever follows the last sound record of a closed segment.

        If another segment follows, the gap in the record numbers will tell how many were lost here.
        In a writer's last segment, a head whose payload is all there means a damaged record;
        anything else means a record that the writer did not live to finish.
        """
        position = self._positions[name]
        num_damaged = 0
        if position.offset < size and not self._is_followed(name):
            end = claimed_end(descriptor, position.offset)
            num_damaged = int(end is not None and end <= size)
            self._torn += 1 - num_damaged
        self._damaged += num_damaged
        self._positions[name] = replace(
            position,
            offset=size,
            number=position.number + num_damaged,
            lost=position.lost + num_damaged,
        )

    def _is_closed(self, name: str, segment: int) -> bool:
        if self._next_segment(name, segment) is None:
            return not is_live(self._root / name)
        if self._is_followed(name):
            return True
        # What was listed is not the writer's own; that may have come since.
        self._listed[name] = segment_numbers(self._root / name)
        return self._is_followed(name) or not is_live(self._root / name)

    def _is_followed(self, name: str) -> bool:
        """Whether the writer itself has begun a later segment than the one that is read: one begins
        with a later record. A file that somebody has put there closes nothing, or what a living
        writer still appends would be missed."""
        position = self._positions.setdefault(name, Position())
        if self._followed.get(name, -1) > position.segment:
            return True
        least = max(1, position.number)
        listed = self._listed.get(name, [])
        index = bisect.bisect_right(listed, position.segment)
        for segment in listed[index : index + _MOST_LOOKED_AT]:
            number = first_number(self._root / name, segment)
            if number is not None and number >= least:
                self._followed[name] = segment
                return True
        return False

    def _next_segment(self, name: str, segment: int) -> int | None:
        """The lowest segment above ``segment``, by the last listing or, if that has none, by a new
        one: a log of an hour has thousands of segments. It may have been evicted since."""
        listed = self._listed.get(name, [])
        if not listed or listed[-1] <= segment:
            listed = self._listed[name] = segment_numbers(self._root / name)
        index = bisect.bisect_right(listed, segment)
        return listed[index] if index < len(listed) else None

    def _enter_next_segment(self, name: str) -> bool:
        """Move on to the next existing segment; False if there is none."""
        self._count_evicted(name)
        position = self._positions[name]
        is_dead = not is_live(self._root / name)  # checked first: a dead writer begins no segment
        later = self._next_segment(name, position.segment)
        if later is not None:
            self._positions[name] = replace(position, segment=later, offset=0)
        elif is_dead and position.number:  # with no record yet, it may be about to take its lock
            self._finished.add(name)
        return later is not None

    def _count_evicted(self, name: str) -> None:
        position = self._positions[name]
        tombstone = read_tombstone(self._root / name)
        if tombstone is not None and tombstone.next_number > position.number:
            evicted = tombstone.next_number - position.number
            self._evicted_unread += evicted
            self._positions[name] = replace(
                position, number=tombstone.next_number, lost=position.lost + evicted
            )


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


def position_of(name: str, position: Any) -> Position:
    """What a reader's offsets say of one writer.

    Raises:
        ValueError: they are not such offsets.
    """
    match position:
        case {"segment": segment, "offset": offset, "number": number}:
            # Older checkpoints lack the last two.
            values = (segment, offset, number, position.get("lost", 0), position.get("deleted", 0))
            if all(map(is_whole, values)):
                return Position(*values)
    raise ValueError(
        f"offsets of {name[:80]!r} must hold segment, offset and number, whole numbers of at most "
        f"63 bits, got {repr(position)[:200]}"
    )
