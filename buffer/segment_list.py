"""The segment files of a log, with their sizes and times."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from buffer.distinct_writers import writer_folders
from buffer.frames import read_frame
from buffer.layout import (
    first_open,
    is_live,
    open_segment,
    said_once,
    segment_numbers,
    segment_path,
    stored_bytes,
)
from buffer.small_json import is_foreign


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment file."""

    folder: Path
    """Of its writer."""
    number: int
    num_bytes: int
    """On the disk."""
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
        found: list[Segment | None] = []
        for folder in (self._root / name for name in writer_folders(self._root)):
            try:
                numbers = segment_numbers(folder)
            except OSError as error:
                if not is_foreign(error):
                    raise
                said_once(folder, error.strerror or type(error).__name__)
                continue
            # Checked after the listing: a writer takes its lock before it begins a segment.
            if folder == own:
                written = own_open
            else:
                written = first_open(folder, numbers) if numbers and is_live(folder) else None
            for number in numbers:
                is_written = written is not None and number >= written
                found.append(self._describe(folder, number, is_written))
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
        except OSError as error:
            if not is_foreign(error):
                raise
            said_once(segment_path(folder, number), error.strerror or type(error).__name__)
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
    # A file of holes takes no room, and must not push out what does. The system may be late with
    # the blocks of a file that is being written.
    stored = status.st_size if is_written else stored_bytes(status)
    return Segment(folder, number, stored, oldest_ms, written_ms, is_written)
