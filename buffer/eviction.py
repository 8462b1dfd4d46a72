"""Eviction of old traces: whole segments, oldest first, by age and by bytes, counted exactly."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from buffer.distinct_writers import writer_folders
from buffer.frames import scan
from buffer.hour_of_traffic import LEAST_BYTES, Traffic, allowed_bytes, measure
from buffer.interface import TraceLimits
from buffer.layout import (
    GROUPS,
    QUARANTINE,
    TOMBSTONE,
    Tombstone,
    eviction_lock,
    file_of,
    is_live,
    open_segment,
    read_tombstone,
    said_once,
    segment_numbers,
    segment_path,
    write_tombstone,
)
from buffer.segment_list import Segment, SegmentList
from buffer.small_json import is_foreign


@dataclass(frozen=True, slots=True)
class Evicted:
    """What was evicted. Join with ``+``."""

    records: int = 0
    num_bytes: int = 0

    def __add__(self, other: Evicted) -> Evicted:
        return Evicted(self.records + other.records, self.num_bytes + other.num_bytes)


@dataclass(frozen=True, slots=True)
class Contents:
    """Records of one closed segment, as its writer knows without reading it again."""

    records: int
    next_number: int
    """Number of the record that follows the last one."""


class Evictor:
    """Evicts on behalf of one writer."""

    def __init__(self, root: Path, limits: TraceLimits, own: Path) -> None:
        """
        Args:
            root: folder of the log.
            limits: what it may hold.
            own: the writer's folder.
        """
        self._root, self._limits, self._own = root, limits, own
        self._segments = SegmentList(root)
        self._contents: dict[int, Contents] = {}
        self.max_bytes = limits.max_bytes or LEAST_BYTES
        """What the log may hold at present."""
        with contextlib.suppress(OSError):  # measured again before the first segment
            self.max_bytes = allowed_bytes(limits, measure(self._segments.refresh(own)), root)
        self.evicted = Evicted()
        """All that was evicted on behalf of this writer."""
        self.missing = 0
        """Records of the writer's own closed segments that somebody deleted, not an eviction."""

    def move_to(self, own: Path) -> None:
        """The writer has made a new folder."""
        self.lose_folder()
        self._own = own

    def lose_folder(self) -> None:
        """Somebody has deleted the writer's folder."""
        self.missing += sum(contents.records for contents in self._contents.values())
        self._contents.clear()

    def note_closed(self, segment: int, contents: Contents) -> None:
        """Remember what the writer's own segment holds."""
        self._contents[segment] = contents

    def release(self, segments: Sequence[int]) -> None:
        """Delete closed segments of the writer that nobody needs any more, which is no eviction.
        Does nothing while another process evicts."""
        if not segments:
            return
        with contextlib.suppress(Timeout), eviction_lock(self._root, 0):
            for number in segments:
                segment_path(self._own, number).unlink(missing_ok=True)
                self._contents.pop(number, None)

    def evict(self, now_s: float, own_open: int | None, need_bytes: int = 0) -> None:
        """Delete the oldest segments until ``need_bytes`` more fit and none is older than the TTL.

        A segment that a living process is writing is never deleted, and counts as if it were full.
        Does nothing while another process evicts.

        Args:
            now_s: unix time.
            own_open: number of the writer's own segment that is open.
            need_bytes: room needed for a new segment.

        Raises:
            OSError: the disk failed; what was deleted until then is counted in the tombstones.
        """
        try:
            with eviction_lock(self._root, 0):
                self._evict(now_s, own_open, need_bytes)
        except Timeout:
            return

    def _evict(self, now_s: float, own_open: int | None, need_bytes: int) -> None:
        segments = self._segments.refresh(self._own, own_open)
        self._drop_missing({one.number for one in segments if one.folder == self._own})
        traffic: Traffic = measure(segments)
        self.max_bytes = allowed_bytes(self._limits, traffic, self._root)
        total = need_bytes + sum(map(self._planned_bytes, segments))
        expired_ms = (now_s - self._limits.ttl_s) * 1000
        for segment in sorted(segments, key=lambda s: (s.oldest_ms, s.folder.name, s.number)):
            too_old, too_much = segment.oldest_ms <= expired_ms, total > self.max_bytes
            if not too_old and not too_much:
                break
            if not segment.is_written:
                self.evicted += self._delete(segment)
                total -= segment.num_bytes
        _sweep(self._root, expired_ms / 1000)

    def _drop_missing(self, present: set[int]) -> None:
        """Forget own segments that are gone: other processes evict, too, and people delete."""
        missing = self._contents.keys() - present
        if missing:
            tombstone = read_tombstone(self._own)
            evicted = -1 if tombstone is None else tombstone.segment
            for number in missing:
                records = self._contents.pop(number).records
                self.missing += records if number > evicted else 0

    def _planned_bytes(self, segment: Segment) -> int:
        full = self._limits.segment_bytes if segment.is_written else 0
        return max(segment.num_bytes, full)

    def _delete(self, segment: Segment) -> Evicted:
        """Store the new counts, then delete: after a crash in between, the same is done again."""
        before = read_tombstone(segment.folder) or Tombstone(-1, 0, 0, 0)
        is_counted = before.segment >= segment.number
        after = before if is_counted else _after(before, segment, self._contents_of(segment))
        try:
            write_tombstone(segment.folder, after)
            segment.path.unlink()
        except OSError:
            segment.path.unlink()  # a full disk has room for the counts only once it is gone
            write_tombstone(segment.folder, after)
        return Evicted(after.records - before.records, after.num_bytes - before.num_bytes)

    def _contents_of(self, segment: Segment) -> Contents:
        known = self._contents.pop(segment.number, None) if segment.folder == self._own else None
        return _read_contents(segment) if known is None else known


def _read_contents(segment: Segment) -> Contents:
    records = next_number = 0
    descriptor = open_segment(segment.folder, segment.number)
    try:
        for frame in scan(descriptor, segment.num_bytes):
            records, next_number = records + 1, max(next_number, frame.number + 1)
    finally:
        os.close(descriptor)
    return Contents(records, next_number)


def _after(before: Tombstone, segment: Segment, contents: Contents) -> Tombstone:
    return Tombstone(
        segment.number,
        max(before.next_number, contents.next_number),
        before.records + contents.records,
        before.num_bytes + segment.num_bytes,
    )


def _sweep(root: Path, expired_s: float) -> None:
    """Remove old quarantined records, and empty folders of writers that died long ago. What cannot
    be removed, since it is not what a log makes, stays and stops nobody."""
    for folder in (root / name for name in writer_folders(root)):
        with _passing_over(folder):
            _sweep_writer(root, folder, expired_s)
    for path in (root / QUARANTINE).glob("*.bin"):
        with _passing_over(path):
            # Not what a link leads to, which may be missing: that must not stop a writer.
            if path.lstat().st_mtime <= expired_s:
                path.unlink()


def _sweep_writer(root: Path, folder: Path, expired_s: float) -> None:
    if segment_numbers(folder) or is_live(folder):
        return
    marker = folder / TOMBSTONE
    last_used = marker if marker.exists() else folder
    if last_used.stat().st_mtime <= expired_s:
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
        for group in (path for path in (root / GROUPS).glob("*") if path.is_dir()):
            for ending in (".json", ".lock"):
                left = file_of(group, folder.name, ending)
                with _passing_over(left):
                    left.unlink(missing_ok=True)


@contextlib.contextmanager
def _passing_over(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:  # another server has removed it
        pass
    except OSError as error:
        if not is_foreign(error):
            raise
        said_once(path, error.strerror or type(error).__name__)
