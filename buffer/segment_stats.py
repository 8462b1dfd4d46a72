"""Counts what the embedded log holds and what each group has done with it.

Writers, members and evictors go on meanwhile, and nobody holds all of them up. So what was evicted
is read first, then what the groups have committed, then the segments: each is at most as far as
what is read after it, and the sums are those of the moment at which the groups were read, with what
was written since as pending.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from buffer.committed import sound_committed
from buffer.counts import BufferStats, GroupCounts
from buffer.distinct_writers import distinct_writers
from buffer.layout import GROUPS, file_of, group_names, read_tombstone, said_once
from buffer.segment_reader import Position
from buffer.segment_report import SegmentReport, check_writer


@dataclass(frozen=True, slots=True)
class _Written:
    """Records of one writer."""

    end: int
    """How many it has written."""
    known: int
    """One past the number of the last that its files know of: fewer if somebody has overwritten
    them."""
    evicted: int
    """Those with lower numbers were gone before any group was looked at."""
    deleted: tuple[int, ...]
    """Numbers of those that were deleted, ascending."""


Positions = Mapping[str, Mapping[str, Position]]
"""Group -> writer -> how far it has committed."""


def log_stats(root: Path) -> BufferStats:
    """Count the records of a log by reading all of it, without changing anything.

    Raises:
        OSError: the disk failed.
    """
    names = distinct_writers(root)
    evicted = {name: _evicted(root / name) for name in names}
    positions = _positions(root, names)
    found = {name: check_writer(root / name) for name in names}
    # A writer that was swept away meanwhile is counted nowhere, as if it had gone before.
    names = [name for name in names if (root / name).is_dir()]
    written = {
        name: _written(name, *found[name], evicted[name], _evicted(root / name), positions)
        for name in names
    }
    reports = [report for name in names for report in found[name][0]]
    return BufferStats(
        num_writers=len(written),
        appended=sum(one.end for one in written.values()),
        held=sum(report.records for report in reports),
        held_bytes=sum(report.stored_bytes for report in reports),
        groups=tuple(_counts_of(group, positions[group], written) for group in sorted(positions)),
        deleted=sum(len(one.deleted) for one in written.values()),
        deleted_bytes=sum(report.deleted_bytes for report in reports),
        forgotten=sum(one.end - one.known for one in written.values()),
    )


def _evicted(folder: Path) -> int:
    tombstone = read_tombstone(folder)
    return 0 if tombstone is None else tombstone.next_number


def _positions(root: Path, names: list[str]) -> Positions:
    folders = [root / GROUPS / group for group in group_names(root)]
    return {
        folder.name: {name: _position(root, folder, name) for name in names} for folder in folders
    }


def _position(root: Path, folder: Path, name: str) -> Position:
    position, problem = sound_committed(root, folder, name)
    if problem is not None:
        said_once(file_of(folder, name, ".json"), problem)
    return position


def _written(
    name: str,
    reports: list[SegmentReport],
    end: int,
    evicted: int,
    evicted_since: int,
    positions: Positions,
) -> _Written:
    """
    Args:
        end: as the segments show it.
        evicted: before the groups were looked at.
        evicted_since: when the segments had been read, too.
    """
    known = max(end, evicted, evicted_since)
    passed = max((places[name].number for places in positions.values()), default=0)
    deleted = tuple(number for report in reports for number in report.deleted)
    return _Written(max(known, passed), known, evicted, deleted)


def _counts_of(
    group: str, places: Mapping[str, Position], written: Mapping[str, _Written]
) -> GroupCounts:
    committed = pending = lost = deleted = 0
    for name, one in written.items():
        place = places[name]
        reached = max(place.number, one.evicted)
        ahead = len(one.deleted) - bisect.bisect_left(one.deleted, reached)
        forgotten = one.end - max(one.known, reached)
        committed += place.number - place.lost - place.deleted
        lost += place.lost + reached - place.number + forgotten
        deleted += place.deleted + ahead
        pending += one.end - reached - ahead - forgotten
    return GroupCounts(group, committed, pending, lost, deleted)
