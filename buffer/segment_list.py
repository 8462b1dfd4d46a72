"""The segment files of a log, with their sizes and times."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from buffer.distinct_writers import writer_folders
from buffer.frames import read_frame
from buffer.layout import is_live, open_segment, segment_numbers, segment_path


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment file."""

    folder: Path
    """Of its writer."""
    number: int
    num_bytes: int
    oldest_ms: int
    """When its first record was appended, unix ms; when it was last written, if that is damaged."""
    newest_ms: int
    """When it was last written, unix ms."""
    is_written: bool
    """A living process is still appending to it."""

    @property
    def path(self) -> Path:
        return segment_path(self.folder, self.number)


class SegmentList:
    """Lists the segments of a log again and again, and opens each closed one only once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._closed: dict[tuple[Path, int], Segment] = {}

    def refresh(self, own: Path | None = None, own_open: int | None = None) -> list[Segment]:
        """All segments there are now, in no order.

        Args:
            own: folder of the calling writer, if a writer calls.
            own_open: number of the segment that it is writing.
        """
        found = []
        for folder in (self._root / name for name in writer_folders(self._root)):
            numbers = segment_numbers(folder)
            # Checked after the listing: a writer takes its lock before it begins a segment.
            others_open = numbers[-1] if numbers and is_live(folder) else None
            written = own_open if folder == own else others_open
            found += [self._describe(folder, number, number == written) for number in numbers]
        segments = [segment for segment in found if segment is not None]
        self._closed = {(s.folder, s.number): s for s in segments if not s.is_written}
        return segments

    def _describe(self, folder: Path, number: int, is_written: bool) -> Segment | None:
        known = self._closed.get((folder, number))
        if known is not None and not is_written:
            return known
        try:
            return _describe(folder, number, is_written)
        except FileNotFoundError:  # another process has evicted it
            return None


def _describe(folder: Path, number: int, is_written: bool) -> Segment:
    descriptor = open_segment(folder, number)
    try:
        status = os.fstat(descriptor)
        first = read_frame(descriptor, 0, status.st_size)
    finally:
        os.close(descriptor)
    written_ms = int(status.st_mtime * 1000)
    oldest_ms = written_ms if first is None else first.unix_ms
    return Segment(folder, number, status.st_size, oldest_ms, written_ms, is_written)
