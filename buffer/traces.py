"""The log of traces: how ``buffer.url`` is opened, and how records become traces again.

What cannot be decoded is put aside and counted, never raised: one bad record must not stop a
trainer.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buffer.codec import UnreadableRecordError, decode_trace
from buffer.files import write_atomically
from buffer.layout import QUARANTINE
from buffer.records import Trace
from buffer.segments import Record, SegmentReader, SegmentWriter

_MAX_GAPS = 1024  # per producer epoch; beyond it the oldest gap counts as seen
_MAX_EPOCHS = 256  # producer epochs remembered; the one heard of first is forgotten first
_QUARANTINE_BYTES = 64 << 20


def log_root(url: str, run_dir: Path) -> Path:
    """Folder of the log that ``buffer.url`` names.

    Raises:
        ValueError: the scheme is unknown, or the folder is not absolute.
    """
    scheme, _, path = url.partition(":")
    if scheme != "log" or ":" not in url:
        raise ValueError(
            f"buffer.url {url!r} has an unknown scheme; known are 'log:' (run_dir/traces) "
            f"and 'log:/some/folder'"
        )
    if not path:
        return run_dir / "traces"
    if not path.startswith("/"):
        raise ValueError(f"buffer.url {url!r} must name an absolute folder, as in 'log:/{path}'")
    return Path(path)


def open_trace_writer(
    url: str,
    run_dir: Path,
    *,
    segment_bytes: int,
    max_bytes: int,
    ttl_s: float,
    sync_interval_s: float,
) -> SegmentWriter:
    """A writer for ``encode_trace``'s blobs. Parameters as in ``SegmentWriter``."""
    return SegmentWriter(
        log_root(url, run_dir),
        segment_bytes=segment_bytes,
        max_bytes=max_bytes,
        ttl_s=ttl_s,
        sync_interval_s=sync_interval_s,
    )


def open_trace_reader(
    url: str, run_dir: Path, *, offsets: Mapping[str, Any] | None = None
) -> TraceReader:
    """A reader that begins at ``offsets`` (from ``TraceReader.offsets()``), or at the oldest."""
    return TraceReader(log_root(url, run_dir), offsets)


@dataclass(frozen=True, slots=True)
class TraceCounts:
    """What became of the records.

    Written = read + duplicate + quarantined + damaged + evicted_unread + not read yet.
    """

    read: int
    """Traces handed out."""
    duplicate: int
    quarantined: int
    """Records that are no trace, or one that contradicts itself."""
    damaged: int
    torn: int
    evicted_unread: int
    quarantined_by_reason: dict[str, int]
    """See ``codec.Reason``."""


class TraceReader:
    """Hands out every trace once, sound and decoded."""

    def __init__(
        self,
        root: Path,
        offsets: Mapping[str, Any] | None = None,
        *,
        quarantine_bytes: int = _QUARANTINE_BYTES,
    ) -> None:
        """Begin at ``offsets``, or at the oldest record.

        Args:
            root: folder of the log.
            offsets: what an earlier reader's ``offsets()`` returned.
            quarantine_bytes: bytes of unreadable records kept for a look; more are only counted.

        Raises:
            ValueError: ``offsets`` are not what ``offsets()`` returns.
        """
        offsets = offsets or {"places": {}, "seen": []}
        self._segments = SegmentReader(root, offsets["places"])
        self._seen = SeenTraces.from_json(offsets["seen"])
        self._quarantine = root / QUARANTINE
        self._quarantine_bytes = quarantine_bytes
        self._read = self._duplicate = 0
        self._reasons: Counter[str] = Counter()

    @property
    def counts(self) -> TraceCounts:
        """Counts since this reader was made."""
        below = self._segments.counts
        return TraceCounts(
            read=self._read,
            duplicate=self._duplicate,
            quarantined=self._reasons.total(),
            damaged=below.damaged,
            torn=below.torn,
            evicted_unread=below.evicted_unread,
            quarantined_by_reason=dict(self._reasons),
        )

    def offsets(self) -> dict[str, Any]:
        """Place in the log and triples seen; JSON keeps it. Store it with what was learnt."""
        return {"places": self._segments.offsets(), "seen": self._seen.to_json()}

    def read(self, max_traces: int) -> list[Trace]:
        """Up to ``max_traces`` traces that came since the last call; never blocks.

        Fewer, even none, may come while more are waiting, when records were put aside.
        """
        traces = [self._decode(record) for record in self._segments.read(max_traces)]
        return [trace for trace in traces if trace is not None]

    def _decode(self, record: Record) -> Trace | None:
        try:
            trace = decode_trace(record.payload)
        except UnreadableRecordError as error:
            self._put_aside(record, error)
            return None
        if not self._seen.add(trace.producer, trace.epoch, trace.seq):
            self._duplicate += 1
            return None
        self._read += 1
        return trace

    def _put_aside(self, record: Record, error: UnreadableRecordError) -> None:
        self._reasons[error.reason] += 1
        name = f"{error.reason}-{record.writer}-{record.segment:06d}-{record.offset}.bin"
        with contextlib.suppress(OSError):  # a full disk costs the evidence, not the trainer
            self._quarantine.mkdir(exist_ok=True)
            used = sum(path.stat().st_size for path in self._quarantine.glob("*.bin"))
            if used + len(record.payload) <= self._quarantine_bytes:
                write_atomically(self._quarantine / name, record.payload)


@dataclass(slots=True)
class SeenTraces:
    """The (producer, epoch, seq) triples that were seen, as ranges of seq."""

    _ranges: dict[tuple[str, int], list[list[int]]] = field(default_factory=dict)
    """Ascending, disjoint [first, past the last]."""

    def add(self, producer: str, epoch: int, seq: int) -> bool:
        """Remember a triple; False if it was seen before."""
        ranges = self._ranges.setdefault((producer, epoch), [])
        if len(self._ranges) > _MAX_EPOCHS:
            del self._ranges[next(iter(self._ranges))]
        index = bisect.bisect_right(ranges, seq, key=lambda one: one[0])
        if index and seq < ranges[index - 1][1]:
            return False
        ranges.insert(index, [seq, seq + 1])
        _join_neighbours(ranges, index)
        if len(ranges) > _MAX_GAPS:
            ranges[:2] = [[ranges[0][0], ranges[1][1]]]
        return True

    def to_json(self) -> list[list[Any]]:
        return [
            [producer, epoch, [list(one) for one in ranges]]
            for (producer, epoch), ranges in self._ranges.items()
        ]

    @classmethod
    def from_json(cls, stored: list[list[Any]]) -> SeenTraces:
        """Undo ``to_json``."""
        return cls(
            {(producer, epoch): [list(one) for one in ranges] for producer, epoch, ranges in stored}
        )


def _join_neighbours(ranges: list[list[int]], index: int) -> None:
    """Join the range at ``index`` with those that touch it."""
    if index + 1 < len(ranges) and ranges[index][1] == ranges[index + 1][0]:
        ranges[index : index + 2] = [[ranges[index][0], ranges[index + 1][1]]]
    if index and ranges[index - 1][1] == ranges[index][0]:
        ranges[index - 1 : index + 1] = [[ranges[index - 1][0], ranges[index][1]]]
