"""How many bytes a log may hold when the settings leave it open: an hour of its own traffic.

The traffic is read off the segments themselves, so that it is known after a restart, to every
writer, and to ``buffer inspect``. It is measured over the hour before the newest record: a log
that nobody writes to keeps what it has.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from buffer.interface import TraceLimits
from buffer.segment_list import Segment

HOUR_S = 3600.0
LEAST_BYTES = 1 << 30
"""A log may hold this much however little traffic there is, disk permitting."""
SHARE_OF_FREE_DISK = 0.1
"""Most of the disk that a log may take, of what would be free without it."""
_LEAST_SPAN_S = 60.0  # a burst of seconds says nothing about an hour


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a log holds, and how fast it was written."""

    num_bytes: int
    """Size of all segments."""
    bytes_per_s: float
    """Over the hour before the newest record, or over the age of a younger log."""


def measure(segments: Sequence[Segment]) -> Traffic:
    """Measure the traffic of a log by its segments."""
    if not segments:
        return Traffic(0, 0.0)
    newest_ms = max(segment.newest_ms for segment in segments)
    hour_began_ms = newest_ms - HOUR_S * 1000
    recent = [segment for segment in segments if segment.newest_ms > hour_began_ms]
    began_ms = max(hour_began_ms, min(segment.oldest_ms for segment in recent))
    span_s = max((newest_ms - began_ms) / 1000, _LEAST_SPAN_S)
    total = sum(segment.num_bytes for segment in segments)
    return Traffic(total, sum(segment.num_bytes for segment in recent) / span_s)


def allowed_bytes(limits: TraceLimits, traffic: Traffic, root: Path) -> int:
    """Bytes that a log may hold: ``limits.max_bytes``, or an hour of traffic.

    The latter is at least ``LEAST_BYTES`` and at most ``SHARE_OF_FREE_DISK``, and holds two
    segments on the fullest disk.

    Raises:
        OSError: the disk failed.
    """
    if limits.max_bytes is not None:
        return limits.max_bytes
    without_log = shutil.disk_usage(root).free + traffic.num_bytes
    wanted = max(LEAST_BYTES, int(traffic.bytes_per_s * HOUR_S))
    return max(min(wanted, int(without_log * SHARE_OF_FREE_DISK)), 2 * limits.segment_bytes)
