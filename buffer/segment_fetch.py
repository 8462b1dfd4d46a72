"""Records of the embedded log at known locations, without reading what lies before them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from buffer.frames import read_frame
from buffer.interface import Location, Payload
from buffer.layout import WRITER_NAME, open_segment, said_once
from buffer.small_json import is_foreign

_LOCATION = re.compile(r"([0-9]{1,9})-([0-9]{1,18})")
"""As ``segment_reader.SegmentReader`` gives them: segment, and offset in it."""


def records_at(root: Path, locations: Collection[Location]) -> dict[Location, Payload]:
    """The sound records at these locations. Missing are those that were evicted or deleted, or are
    damaged, and locations that no reader of a log gives.

    Args:
        root: folder of the log.

    Raises:
        OSError: the disk failed.
    """
    by_segment: dict[tuple[str, int], dict[int, Location]] = defaultdict(dict)
    for writer, location in locations:
        parts = _LOCATION.fullmatch(location)
        if parts is not None and WRITER_NAME.fullmatch(writer):
            by_segment[writer, int(parts[1])][int(parts[2])] = writer, location
    found = dict[Location, Payload]()
    for (writer, segment), starts in sorted(by_segment.items()):
        for start, payload in _in_segment(root / writer, segment, sorted(starts)):
            found[starts[start]] = payload
    return found


def _in_segment(folder: Path, segment: int, starts: list[int]) -> Iterator[tuple[int, Payload]]:
    try:
        descriptor = open_segment(folder, segment)
    except (FileNotFoundError, NotADirectoryError):  # evicted
        return
    except OSError as error:
        if not is_foreign(error):
            raise
        said_once(folder, error.strerror or type(error).__name__)
        return
    try:
        size = os.fstat(descriptor).st_size
        for start in starts:
            frame = read_frame(descriptor, start, size)
            if frame is not None and not frame.is_deleted:
                yield start, frame.payload
    finally:
        os.close(descriptor)
