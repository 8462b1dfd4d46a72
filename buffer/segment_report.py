"""Reports on segment files, for ``buffer inspect``."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from buffer.distinct_writers import distinct_writers
from buffer.frames import claimed_end, scan
from buffer.hour_of_traffic import allowed_bytes, measure
from buffer.interface import Report, TraceLimits
from buffer.layout import (
    is_live,
    open_segment,
    read_tombstone,
    said_once,
    segment_numbers,
    segment_path,
    stored_bytes,
)
from buffer.segment_list import SegmentList
from buffer.small_json import is_foreign


@dataclass(frozen=True, slots=True)
class SegmentReport(Report):
    """Contents of one segment file."""

    writer: str
    segment: int
    records: int
    """Sound records that were not deleted."""
    num_bytes: int
    """Size of the file."""
    torn_bytes: int
    """Bytes after the last sound record; in a live segment a record may be only partly written."""
    damaged: int
    """Records that were written whole but cannot be read any more."""
    live: bool
    """Its writer is still running."""
    deleted: tuple[int, ...] = ()
    """Numbers of the records that were deleted with their tenant."""
    stored_bytes: int = 0
    """What the file takes on the disk, as it counts towards ``buffer.max_bytes``: less than its
    size if it has holes."""
    deleted_bytes: int = 0
    """Bytes of the deleted records, heads included; their room is kept."""

    @property
    def is_damaged(self) -> bool:
        return self.damaged > 0

    def to_line(self) -> str:
        live = ", being written" if self.live else ""
        deleted = f", deleted {len(self.deleted)}" if self.deleted else ""
        return (
            f"segment {self.writer}/{self.segment:06d}: {self.records} records, "
            f"{self.num_bytes} bytes, torn {self.torn_bytes} bytes, damaged {self.damaged}"
            f"{deleted}{live}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"kind": "segment", **asdict(self), "deleted": len(self.deleted)}


@dataclass(frozen=True, slots=True)
class SizeReport(Report):
    """How large a log is, how fast it grows, and what it may hold."""

    segments: int
    num_bytes: int
    bytes_per_s: float
    """Over the hour before the newest record."""
    max_bytes: int
    """Beyond it, the oldest segments are evicted."""
    is_measured: bool
    """``max_bytes`` is an hour of traffic; otherwise the settings name it."""

    @property
    def is_damaged(self) -> bool:
        return False

    def to_line(self) -> str:
        why = "an hour of traffic, disk permitting" if self.is_measured else "buffer.max_bytes"
        return (
            f"log: {self.num_bytes} bytes in {self.segments} segments, written at "
            f"{self.bytes_per_s:.0f} bytes/s; holds up to {self.max_bytes} bytes ({why})"
        )

    def to_json(self) -> dict[str, Any]:
        return {"kind": "log", **asdict(self)}


def report_size(root: Path, limits: TraceLimits) -> SizeReport:
    """Measure a log by its segments, as its writers do."""
    segments = SegmentList(root).refresh()
    traffic = measure(segments)
    max_bytes = allowed_bytes(limits, traffic, root)
    is_measured = limits.max_bytes is None
    return SizeReport(len(segments), traffic.num_bytes, traffic.bytes_per_s, max_bytes, is_measured)


def check_segments(root: Path) -> list[SegmentReport]:
    """Read every segment of a log from its first byte to its last, without changing anything.

    Nothing has to be repaired before reading: readers step over damaged and torn records.
    """
    return [report for name in distinct_writers(root) for report in check_writer(root / name)[0]]


def check_writer(folder: Path) -> tuple[list[SegmentReport], int]:
    """Reports on the segments of a writer, and the number of the record that it writes next."""
    reports = []
    number = _next_after_evicted(folder)
    numbers = segment_numbers(folder)
    live = is_live(folder)
    for segment in numbers:
        is_last = segment == numbers[-1]
        try:
            report, number = _report(folder, segment, number, live=live, is_last=is_last)
            reports.append(report)
        except FileNotFoundError:  # evicted meanwhile, which is no damage
            number = max(number, _next_after_evicted(folder))
        except OSError as error:
            if not is_foreign(error):
                raise
            said_once(segment_path(folder, segment), error.strerror or type(error).__name__)
    return reports, number


def _next_after_evicted(folder: Path) -> int:
    """Number of the first record of a writer that was not evicted."""
    tombstone = read_tombstone(folder)
    return 0 if tombstone is None else tombstone.next_number


def _report(
    folder: Path, segment: int, number: int, *, live: bool, is_last: bool
) -> tuple[SegmentReport, int]:
    """Report on one segment, and the number of the record that follows it."""
    records = damaged = deleted_bytes = end = 0
    deleted: list[int] = []
    descriptor = open_segment(folder, segment)
    try:
        status = os.fstat(descriptor)
        size = status.st_size
        for frame in scan(descriptor, size):
            damaged += max(0, frame.number - number)
            if not frame.is_deleted:
                records += 1
            else:
                deleted_bytes += frame.end - frame.start
                if frame.number >= number:  # lower ones come again where somebody copied a segment
                    deleted.append(frame.number)
            end, number = frame.end, max(number, frame.number + 1)
        claimed = claimed_end(descriptor, end) if is_last else None
    finally:
        os.close(descriptor)
    if claimed is not None and claimed <= size:
        damaged, number = damaged + 1, number + 1
    is_written = live and is_last
    report = SegmentReport(
        folder.name,
        segment,
        records,
        size,
        size - end,
        damaged,
        is_written,
        tuple(deleted),
        size if is_written else stored_bytes(status),
        deleted_bytes,
    )
    return report, number
