"""Reads traces from any backend: decodes records and removes duplicates.

A record that cannot be decoded is set aside and counted, never raised: one bad record must not stop
a trainer.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from buffer.codec import UnreadableRecordError, decode_traces
from buffer.deletions import Deletions, DeletionWatch
from buffer.interface import (
    MAX_READ_BYTES,
    Backend,
    Location,
    Offsets,
    Record,
    ServiceAwayError,
    TraceLimits,
)
from buffer.records import Trace
from buffer.seen import Identity, SeenTraces

log = logging.getLogger(__name__)

_RECORDS_AT_ONCE = 8
_TRACES_AT_ONCE = 256
_EXPIRE_EVERY_S = 60.0


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

    def lost(self) -> str | None:
        """What was written and cannot be read, as one line; ``None``: nothing."""
        parts = (
            (self.damaged, "damaged records"),
            (self.quarantined, "unreadable records"),
            (self.torn, "torn ends of segments"),
        )
        found = ", ".join(f"{number} {what}" for number, what in parts if number)
        return f"left out: {found}; `buffer inspect` says more" if found else None


class TraceReader:
    """Returns every trace once, decoded and checked; in a group, to one of its readers."""

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
        self._unclaimed: list[tuple[Record, Trace]] = []
        """Read, and not claimed yet, because the service went away in between."""
        self._places = self._records.offsets()
        """Before ``_unclaimed``."""
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
        return {"places": self.places(), "seen": self._seen.to_json()}

    def places(self) -> dict[str, Any]:
        """Offsets in the backend alone; cheap, however much was seen."""
        return self._places if self._unclaimed else self._records.offsets()

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
        """``read_located``, without the locations."""
        return [trace for _, trace in self.read_located(max_traces)]

    def read_located(self, max_traces: int) -> list[tuple[Location, Trace]]:
        """Up to ``max_traces`` new traces; never blocks.

        Records set aside count towards ``max_traces``, so fewer traces, even none, may be returned
        while more are waiting. Stops early once ``MAX_READ_BYTES`` are reached.

        Raises:
            ServiceAwayError: try again later.
            OSError: storage failed.
        """
        self._deletions.look()
        self._expire()
        if not self._unclaimed:
            self._places = self._records.offsets()
            self._unclaimed = self._next_traces(max_traces)
        return self._claimed()

    def fetch(self, locations: Collection[Location]) -> dict[Location, Trace] | None:
        """Traces at locations that ``read_located`` gave, whatever was read since. Those that
        are no longer there, or were deleted with their tenant, are missing. Nothing is counted.

        Returns:
            ``None``: the backend finds traces only by reading all of them.

        Raises:
            OSError: storage failed.
        """
        self._deletions.look()
        stored = self._backend.fetch(locations)
        if stored is None:
            return None
        decoded = zip(stored, decode_traces(stored.values()), strict=True)
        return {
            location: trace
            for location, trace in decoded
            if isinstance(trace, Trace)
            and not self._deletions.latest.covers(trace.tenant, trace.finished_unix_ms)
        }

    def _next_traces(self, max_records: int) -> list[tuple[Record, Trace]]:
        """Traces of the next records, with these; those that are none are put aside."""
        traces: list[tuple[Record, Trace]] = []
        num_records = num_bytes = 0
        while num_records < max_records and num_bytes < MAX_READ_BYTES:
            # A few at a time: they are checked while the processor's cache still holds them.
            try:
                records = self._records.read(min(_RECORDS_AT_ONCE, max_records - num_records))
            except ServiceAwayError:
                if num_records == 0:
                    raise
                break  # the next call meets the error
            if not records:
                break
            num_records += len(records)
            num_bytes += sum(len(record.payload) for record in records)
            decoded = decode_traces(record.payload for record in records)
            for record, trace in zip(records, decoded, strict=True):
                if isinstance(trace, UnreadableRecordError):
                    self._put_aside(record, trace)
                elif self._deletions.latest.covers(trace.tenant, trace.finished_unix_ms):
                    self._deleted += 1
                else:
                    traces.append((record, trace))
        return traces

    def _claimed(self) -> list[tuple[Location, Trace]]:
        """Those of ``_unclaimed`` that are new, to this reader and to its group."""
        # Each record is asked about, for another one with the same trace may be the one it is
        # learnt from.
        found = [(record, _identity_of(trace)) for record, trace in self._unclaimed]
        unknown = [one for one in found if one[1] not in self._seen]
        claims = iter(self._records.claim(unknown) if unknown else ())
        is_ours = [of not in self._seen and next(claims) for _, of in found]
        traces = [
            ((record.writer, record.location), trace)
            for (record, trace), is_first in zip(self._unclaimed, is_ours, strict=True)
            if is_first and self._seen.add(*_identity_of(trace))
        ]
        self._unclaimed = []
        self._read += len(traces)
        self._duplicate += len(found) - len(traces)
        return traces

    def _expire(self) -> None:
        if self._limits is None or time.monotonic() < self._next_expire_s:
            return
        self._next_expire_s = time.monotonic() + min(_EXPIRE_EVERY_S, self._limits.ttl_s / 8)
        with contextlib.suppress(OSError):  # tried again; whatever reads says so
            self._backend.expire(self._limits)

    def _put_aside(self, record: Record, error: UnreadableRecordError) -> None:
        if not self._reasons[error.reason]:
            # Its text alone: the frames of its traceback hold the record and its reader.
            log.warning("a record is put aside, as others like it will be: %s", str(error))
        self._reasons[error.reason] += 1
        name = f"{error.reason}-{record.writer}-{record.location}"
        self._backend.keep_unreadable(name, record.payload)


def traces_in(reader: TraceReader) -> Iterator[Trace]:
    """All traces up to the end of the log."""
    before = -1
    while (seen := _num_seen(reader)) != before:  # a read of unreadable records returns nothing
        before = seen
        yield from reader.read(_TRACES_AT_ONCE)


def _num_seen(reader: TraceReader) -> int:
    counts = reader.counts
    return counts.read + counts.duplicate + counts.quarantined + counts.deleted


def _identity_of(trace: Trace) -> Identity:
    return trace.producer, trace.epoch, trace.seq
