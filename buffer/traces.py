"""Reads traces from any backend: decodes records and removes duplicates.

A record that cannot be decoded is set aside and counted, never raised: one bad record must not stop
a trainer.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from buffer.codec import UnreadableRecordError, decode_traces
from buffer.deletions import Deletions, DeletionWatch
from buffer.interface import (
    MAX_READ_BYTES,
    Backend,
    Offsets,
    Record,
    ServiceAwayError,
    TraceLimits,
)
from buffer.records import Trace

log = logging.getLogger(__name__)

_RECORDS_AT_ONCE = 8
_EXPIRE_EVERY_S = 60.0
_MAX_GAPS = 1024  # per producer epoch; beyond it the oldest gap counts as seen
_MAX_EPOCHS = 256  # producer epochs remembered; beyond it the one seen first is forgotten


@dataclass(frozen=True, slots=True)
class TraceCounts:
    """Records by outcome.

    Written = read + duplicate + quarantined + damaged + evicted_unread + deleted + not read yet.
    """

    read: int
    """Traces returned."""
    duplicate: int
    quarantined: int
    """Records that are not a trace, or an inconsistent one."""
    damaged: int
    torn: int
    evicted_unread: int
    quarantined_by_reason: dict[str, int]
    """See ``codec.Reason``."""
    deleted: int = 0
    """Deleted with their tenant."""


class TraceReader:
    """Returns every trace once, decoded and checked."""

    def __init__(
        self,
        backend: Backend,
        offsets: Offsets | None = None,
        group: str | None = None,
        limits: TraceLimits | None = None,
    ) -> None:
        """Continue from ``offsets``, or begin with the oldest record.

        Args:
            backend: where the records are.
            offsets: what an earlier reader's ``offsets()`` returned.
            group: share the traces with the other readers of this group; ``None``: read all.
            limits: remove what is older than they allow from time to time, for no server may be
                there to do it; ``None``: do not.

        Raises:
            ValueError: ``offsets`` are not what ``offsets()`` of such a reader returns.
        """
        offsets = offsets or {"places": {}, "seen": []}
        self._backend = backend
        self._records = backend.open_record_reader(offsets["places"] or None, group)
        self._seen = SeenTraces.from_json(offsets["seen"])
        self._read = self._duplicate = self._deleted = 0
        self._deletions = DeletionWatch(backend.deletions)
        self._limits = limits
        self._next_expire_s = 0.0
        self._reasons: Counter[str] = Counter()

    @property
    def counts(self) -> TraceCounts:
        """Counts since this reader was opened."""
        below = self._records.counts
        return TraceCounts(
            read=self._read,
            duplicate=self._duplicate,
            quarantined=self._reasons.total(),
            damaged=below.damaged,
            torn=below.torn,
            evicted_unread=below.evicted_unread,
            quarantined_by_reason=dict(self._reasons),
            deleted=below.deleted + self._deleted,
        )

    def offsets(self) -> dict[str, Any]:
        """Offsets in the backend and triples seen, for JSON. Store them with what was learnt."""
        return {"places": self._records.offsets(), "seen": self._seen.to_json()}

    def commit(self, offsets: Offsets) -> None:
        """The group is done with all that was read when ``offsets()`` returned this; see
        ``RecordReader.commit``."""
        self._records.commit(offsets["places"])

    @property
    def deletions(self) -> Deletions:
        """Tenants that were deleted, as far as ``read`` knows."""
        return self._deletions.latest

    def close(self) -> None:
        """Leave the group: other members get what was not committed."""
        self._records.close()

    def read(self, max_traces: int) -> list[Trace]:
        """Up to ``max_traces`` new traces; never blocks.

        Records set aside count towards ``max_traces``, so fewer traces, even none, may be returned
        while more are waiting. Stops early once ``MAX_READ_BYTES`` are reached.

        Raises:
            ServiceAwayError: try again later.
            OSError: storage failed.
        """
        traces: list[Trace] = []
        num_records = num_bytes = 0
        self._deletions.look()
        self._expire()
        while num_records < max_traces and num_bytes < MAX_READ_BYTES:
            # A few at a time: they are checked while the processor's cache still holds them.
            try:
                records = self._records.read(min(_RECORDS_AT_ONCE, max_traces - num_records))
            except ServiceAwayError:
                if num_records == 0:
                    raise
                break  # the next call meets the error
            if not records:
                break
            num_records += len(records)
            num_bytes += sum(len(record.payload) for record in records)
            decoded = decode_traces(record.payload for record in records)
            traces += filter(None, map(self._taken, records, decoded))
        return traces

    def _expire(self) -> None:
        if self._limits is None or time.monotonic() < self._next_expire_s:
            return
        self._next_expire_s = time.monotonic() + min(_EXPIRE_EVERY_S, self._limits.ttl_s / 8)
        with contextlib.suppress(OSError):  # tried again; whatever reads says so
            self._backend.expire(self._limits)

    def _taken(self, record: Record, trace: Trace | UnreadableRecordError) -> Trace | None:
        if isinstance(trace, UnreadableRecordError):
            self._put_aside(record, trace)
            return None
        if not self._seen.add(trace.producer, trace.epoch, trace.seq):
            self._duplicate += 1
            return None
        if self._deletions.latest.covers(trace.tenant, trace.finished_unix_ms):
            self._deleted += 1
            return None
        self._read += 1
        return trace

    def _put_aside(self, record: Record, error: UnreadableRecordError) -> None:
        if not self._reasons[error.reason]:
            log.warning("a record is put aside, as others like it will be: %s", error)
        self._reasons[error.reason] += 1
        name = f"{error.reason}-{record.writer}-{record.location}"
        self._backend.keep_unreadable(name, record.payload)


@dataclass(slots=True)
class SeenTraces:
    """The (producer, epoch, seq) triples seen so far, as ranges of seq."""

    _ranges: dict[tuple[str, int], list[list[int]]] = field(default_factory=dict)
    """Ascending, disjoint [first, one past the last]."""

    def add(self, producer: str, epoch: int, seq: int) -> bool:
        """Remember a triple; False if it was seen before."""
        ranges = self._ranges.setdefault((producer, epoch), [])
        if len(self._ranges) > _MAX_EPOCHS:
            del self._ranges[next(iter(self._ranges))]
        if _holds(ranges, seq):
            return False
        index = bisect.bisect_right(ranges, seq, key=lambda one: one[0])
        ranges.insert(index, [seq, seq + 1])
        _join_neighbours(ranges, index)
        if len(ranges) > _MAX_GAPS:
            ranges[:2] = [[ranges[0][0], ranges[1][1]]]
        return True

    def beyond(self, older: SeenTraces) -> Iterator[tuple[str, int, int]]:
        """Triples that ``older`` has not seen."""
        for (producer, epoch), ranges in self._ranges.items():
            before = older._ranges.get((producer, epoch), [])
            for first, end in ranges:
                for seq in range(first, end):
                    if not _holds(before, seq):
                        yield producer, epoch, seq

    def to_json(self) -> list[list[Any]]:
        return [
            [producer, epoch, [list(one) for one in ranges]]
            for (producer, epoch), ranges in self._ranges.items()
        ]

    @classmethod
    def from_json(cls, stored: list[list[Any]]) -> SeenTraces:
        """Inverse of ``to_json``."""
        return cls(
            {(producer, epoch): [list(one) for one in ranges] for producer, epoch, ranges in stored}
        )


def _holds(ranges: list[list[int]], seq: int) -> bool:
    index = bisect.bisect_right(ranges, seq, key=lambda one: one[0])
    return index > 0 and seq < ranges[index - 1][1]


def _join_neighbours(ranges: list[list[int]], index: int) -> None:
    """Merge the range at ``index`` with those that touch it."""
    if index + 1 < len(ranges) and ranges[index][1] == ranges[index + 1][0]:
        ranges[index : index + 2] = [[ranges[index][0], ranges[index + 1][1]]]
    if index and ranges[index - 1][1] == ranges[index][0]:
        ranges[index - 1 : index + 1] = [[ranges[index - 1][0], ranges[index][1]]]
