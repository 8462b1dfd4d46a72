"""Eviction of old traces: whole segments, oldest first, by age and by bytes, counted exactly."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from buffer.frames import read_frame, scan
from buffer.interface import TraceLimits
from buffer.layout import (
    QUARANTINE,
    TOMBSTONE,
    Tombstone,
    is_live,
    read_tombstone,
    segment_numbers,
    segment_path,
    write_tombstone,
    writer_names,
)


@dataclass(frozen=True, slots=True)
class Evicted:
    """What was evicted. Join with ``+``."""

    records: int = 0
    num_bytes: int = 0

    def __add__(self, other: Evicted) -> Evicted:
        return Evicted(self.records + other.records, self.num_bytes + other.num_bytes)


@dataclass(frozen=True, slots=True)
class _Segment:
    folder: Path
    number: int
    num_bytes: int
    oldest_ms: int
    is_written: bool
    """A living process is still appending to it."""


def evict(
    root: Path,
    limits: TraceLimits,
    now_s: float,
    *,
    own: Path,
    own_open: int | None,
    need_bytes: int = 0,
) -> Evicted:
    """Delete the oldest segments until ``need_bytes`` more fit and none is older than the TTL.

    A segment that a living process is writing is never deleted, and counts as if it were full. Does
    nothing while another process evicts.

    Args:
        root: folder of the log.
        limits: limits of the log.
        now_s: unix time, seconds.
        own: the caller's folder.
        own_open: segment that the caller is writing; for any other living writer it is assumed to
            be the newest one.
        need_bytes: room needed for a new segment.

    Raises:
        OSError: the disk failed; what was deleted until then is counted in the tombstones.
    """
    try:
        with FileLock(root / "EVICT.lock", timeout=0, fallback_to_soft=False):
            return _evict(root, limits, now_s, own, own_open, need_bytes)
    except Timeout:
        return Evicted()


def _evict(
    root: Path, limits: TraceLimits, now_s: float, own: Path, own_open: int | None, need_bytes: int
) -> Evicted:
    segments = _list_segments(root, own, own_open)
    total = need_bytes + sum(_planned_bytes(segment, limits) for segment in segments)
    expired_ms = (now_s - limits.ttl_s) * 1000
    evicted = Evicted()
    for segment in sorted(segments, key=lambda s: (s.oldest_ms, s.folder.name, s.number)):
        too_old, too_much = segment.oldest_ms <= expired_ms, total > limits.max_bytes
        if (too_old or too_much) and not segment.is_written:
            evicted += _delete(segment)
            total -= segment.num_bytes
    _sweep(root, expired_ms / 1000)
    return evicted


def _list_segments(root: Path, own: Path, own_open: int | None) -> list[_Segment]:
    found = []
    for folder in (root / name for name in writer_names(root)):
        numbers = segment_numbers(folder)
        # Checked after the listing: a writer takes its lock before it begins a segment.
        others_open = numbers[-1] if numbers and is_live(folder) else None
        written = own_open if folder == own else others_open
        found += [_describe(folder, number, number == written) for number in numbers]
    return found


def _describe(folder: Path, number: int, is_written: bool) -> _Segment:
    path = segment_path(folder, number)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        first = read_frame(descriptor, 0, status.st_size)
    finally:
        os.close(descriptor)
    oldest_ms = int(status.st_mtime * 1000) if first is None else first.unix_ms
    return _Segment(folder, number, status.st_size, oldest_ms, is_written)


def _planned_bytes(segment: _Segment, limits: TraceLimits) -> int:
    full = limits.segment_bytes if segment.is_written else 0
    return max(segment.num_bytes, full)


def _delete(segment: _Segment) -> Evicted:
    """Store the new counts, then delete: after a crash in between, both are repeated."""
    path = segment_path(segment.folder, segment.number)
    before = read_tombstone(segment.folder) or Tombstone(-1, 0, 0, 0)
    after = before if before.segment >= segment.number else _after(before, segment, path)
    try:
        write_tombstone(segment.folder, after)
        path.unlink()
    except OSError:
        path.unlink()  # a full disk has room for the counts only once the segment is gone
        write_tombstone(segment.folder, after)
    return Evicted(after.records - before.records, after.num_bytes - before.num_bytes)


def _after(before: Tombstone, segment: _Segment, path: Path) -> Tombstone:
    records, next_number = 0, before.next_number
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for frame in scan(descriptor, segment.num_bytes):
            records, next_number = records + 1, max(next_number, frame.number + 1)
    finally:
        os.close(descriptor)
    return Tombstone(
        segment.number, next_number, before.records + records, before.num_bytes + segment.num_bytes
    )


def _sweep(root: Path, expired_s: float) -> None:
    """Remove old quarantined records, and empty folders of writers that died long ago."""
    for folder in (root / name for name in writer_names(root)):
        if not segment_numbers(folder) and not is_live(folder):
            marker = folder / TOMBSTONE
            last_used = marker if marker.exists() else folder
            if last_used.stat().st_mtime <= expired_s:
                shutil.rmtree(folder)
    for path in (root / QUARANTINE).glob("*.bin"):
        if path.stat().st_mtime <= expired_s:
            path.unlink()
