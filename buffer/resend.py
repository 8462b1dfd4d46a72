"""Copies the traces of one buffer to another, each exactly once, or sends some of them again."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NoReturn

from buffer.codec import UnreadableRecordError, decode_traces, encode_trace, identity_of
from buffer.interface import (
    Backend,
    Payload,
    Record,
    RecordTooLargeError,
    Report,
    TraceLimits,
    TraceWriter,
)
from buffer.records import Trace

_RECORDS_AT_ONCE = 64
_BYTES_AT_ONCE = 16 << 20
"""Of records that were sent and not acknowledged: far less than any backend lets wait."""
_LONG_PAUSE_S = 0.2
"""Before a longer pause, everything sent is acknowledged."""


class StoppedError(Exception):
    """The destination failed in the middle; what was acknowledged until then is stored."""

    def __init__(self, sent: Sent, problem: OSError) -> None:
        super().__init__(str(problem))
        self.sent = sent
        self.problem = problem


@dataclass(slots=True)
class Sent(Report):
    """What became of the records of the source."""

    kind: Literal["copy", "replay"]
    read: int = 0
    sent: int = 0
    """Acknowledged by the destination."""
    sent_bytes: int = 0
    already_there: int = 0
    """Traces of which the destination, or an earlier record of the source, had the same producer,
    epoch and number."""
    filtered: int = 0
    """Traces that were not asked for."""
    deleted: int = 0
    """Traces that were asked for and whose tenant was deleted, here or there; they are not sent."""
    unreadable: int = 0
    """Records that are no trace; they are not sent."""
    damaged: int = 0
    """Records that the source held and cannot read any more, or evicted meanwhile."""
    too_large: int = 0
    """Records of over half of ``buffer.max_bytes``, which the destination refuses."""
    evicted: int = 0
    """Records that the destination evicted meanwhile to keep ``buffer.max_bytes``."""
    removed: int = 0
    """Records that the source had deleted before: readers pass over them, so nobody looks whether
    they would have been asked for. They are not among those read."""

    @property
    def is_damaged(self) -> bool:
        return bool(self.unreadable or self.damaged or self.too_large or self.evicted)

    def to_line(self) -> str:
        counts = {"already there": self.already_there, "not asked for": self.filtered}
        if self.deleted:
            counts["left out because their tenant was deleted"] = self.deleted
        if self.removed:
            counts["deleted from there before"] = self.removed
        problems = {
            "unreadable": self.unreadable,
            "damaged or evicted before they were read": self.damaged,
            "too large": self.too_large,
            "evicted there to keep buffer.max_bytes": self.evicted,
        }
        rest = ", ".join(f"{count} {name}" for name, count in counts.items())
        found = ", ".join(f"{count} {name}" for name, count in problems.items() if count)
        return (
            f"{self.kind}: {self.read} records read, {self.sent} sent ({self.sent_bytes} bytes), "
            f"{rest}{'; PROBLEMS: ' + found if found else ''}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Traces to send again: those that satisfy every condition given."""

    since_ms: int | None = None
    """Finished then or later, unix ms."""
    until_ms: int | None = None
    """Finished before."""
    tenants: Collection[str] = ()
    domains: Collection[str] = ()
    versions: Collection[int] = ()
    """Versions of a drafter, one of which made one of its rounds."""

    def has(self, trace: Trace) -> bool:
        """Whether a trace is among them."""
        at = trace.finished_unix_ms
        return (
            (self.since_ms is None or at >= self.since_ms)
            and (self.until_ms is None or at < self.until_ms)
            and (not self.tenants or trace.tenant in self.tenants)
            and (not self.domains or trace.domain in self.domains)
            and (not self.versions or bool(trace.versions & set(self.versions)))
        )


Identity = tuple[str, int, int]
"""(producer, epoch, seq)."""


@dataclass(slots=True)
class _Known:
    """Traces by identity, a set of numbers for each producer and epoch."""

    seqs: dict[tuple[str, int], set[int]] = field(default_factory=dict)

    def add(self, identity: Identity) -> bool:
        """Remember a trace; False if it was known."""
        producer, epoch, seq = identity
        known = self.seqs.setdefault((producer, epoch), set())
        if seq in known:
            return False
        known.add(seq)
        return True


def copy_traces(source: Backend, destination: Backend, limits: TraceLimits) -> Sent:
    """Copy every trace that the destination does not hold yet.

    What was deleted with its tenant, in either of them, is not copied.

    May be interrupted and repeated: what the destination holds is looked up at the start, by
    producer, epoch and number, so nothing is stored twice. For that, all of it is read.

    Args:
        limits: of the destination.

    Raises:
        OSError: one of them cannot be read, or the destination cannot be written to at all.
        ValueError: a list of deletions is damaged.
        StoppedError: the destination failed later.
    """
    known, is_deleted = _Known(), _deleted_in(source, destination)
    for record in _records(destination):
        with contextlib.suppress(UnreadableRecordError):
            known.add(identity_of(record.payload))
    sent = Sent("copy")
    with _sending(destination, limits, sent) as send:
        for trace, payload in _traces(source, sent):
            if is_deleted(trace):
                sent.deleted += 1
            elif known.add((trace.producer, trace.epoch, trace.seq)):
                send(payload)
            else:
                sent.already_there += 1
    return sent


def replay_traces(
    source: Backend,
    destination: Backend,
    limits: TraceLimits,
    wanted: Wanted,
    *,
    rate: float | None = None,
    as_new: bool = False,
) -> Sent:
    """Send traces again, whether or not the destination had them.

    A trainer passes over traces that it knows by their identity. What was deleted with its tenant,
    in either buffer, is not sent.

    Args:
        limits: of the destination.
        rate: traces per second at most.
        as_new: give them a new identity, so that trainers learn them again. Which traces a trainer
            holds out follows from the identity: one that judged candidates may then be trained on.

    Raises:
        OSError: one of them cannot be read, or the destination cannot be written to at all.
        ValueError: a list of deletions is damaged.
        StoppedError: the destination failed later.
    """
    sent, known, renamed = Sent("replay"), _Known(), _Renamed()
    is_deleted = _deleted_in(source, destination)
    with _sending(destination, limits, sent, rate) as send:
        for trace, payload in _traces(source, sent):
            if trace.producer == renamed.producer:
                sent.read -= 1  # sent a moment ago to where it is read from: without end otherwise
            elif not wanted.has(trace):
                sent.filtered += 1
            elif is_deleted(trace):
                sent.deleted += 1
            elif not known.add((trace.producer, trace.epoch, trace.seq)):
                sent.already_there += 1
            else:
                send(encode_trace(renamed.next(trace)) if as_new else payload)
    return sent


def _deleted_in(*backends: Backend) -> Callable[[Trace], bool]:
    """Tells whether a trace was deleted in one of them; where records stay until they are too old,
    or came after their deletion, only the lists say so."""
    lists = [backend.deletions() for backend in backends]
    return lambda trace: any(one.covers(trace.tenant, trace.finished_unix_ms) for one in lists)


@dataclass(slots=True)
class _Renamed:
    """Traces under the name of a producer that nobody has used."""

    producer: str = field(default_factory=lambda: f"replay-{secrets.token_hex(6)}")
    epoch: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    num: int = 0

    def next(self, trace: Trace) -> Trace:
        self.num += 1
        return replace(trace, producer=self.producer, epoch=self.epoch, seq=self.num - 1)


def _records(backend: Backend, sent: Sent | None = None) -> Iterator[Record]:
    reader = backend.open_record_reader()
    gone_before: int | None = None
    try:
        while records := reader.read(_RECORDS_AT_ONCE, _BYTES_AT_ONCE):
            if gone_before is None:  # what was evicted before this began is nobody's problem
                gone_before = reader.counts.evicted_unread
            yield from records
        if sent is not None:
            counts = reader.counts
            gone = 0 if gone_before is None else counts.evicted_unread - gone_before
            sent.damaged = counts.damaged + gone
            sent.removed = counts.deleted
    finally:
        reader.close()


def _traces(backend: Backend, sent: Sent) -> Iterator[tuple[Trace, Payload]]:
    """The traces of a buffer, with their bytes."""
    for record in _records(backend, sent):
        sent.read += 1
        [trace] = decode_traces([record.payload])
        if isinstance(trace, UnreadableRecordError):
            sent.unreadable += 1
        else:
            yield trace, record.payload


@contextlib.contextmanager
def _sending(
    backend: Backend, limits: TraceLimits, sent: Sent, rate: float | None = None
) -> Iterator[Callable[[Payload], None]]:
    """Yields a function that sends one record; all of them are acknowledged at the end."""
    writer = backend.open_trace_writer(limits)
    sender = _Sender(writer, sent, rate)
    try:
        yield sender.send
        sender.settle()
    finally:
        with contextlib.suppress(OSError):  # ``settle`` has met it, or the caller will
            writer.close()
        sent.evicted = writer.counts.evicted_records


@dataclass(slots=True)
class _Sender:
    """Sends records at a rate, and waits often for their acknowledgement."""

    writer: TraceWriter
    sent: Sent
    rate: float | None
    began_s: float = field(default_factory=time.monotonic)
    num: int = 0
    """Sent so far."""
    waiting: list[int] = field(default_factory=list)
    """Bytes of those not acknowledged."""

    def send(self, payload: Payload) -> None:
        """Send one record when it is its turn."""
        self._pace()
        try:
            self.writer.append(payload)
        except RecordTooLargeError:
            self.sent.too_large += 1
            return
        except OSError as error:
            self._stop(error)
        self.num += 1
        self.waiting.append(len(payload))
        if len(self.waiting) >= _RECORDS_AT_ONCE or sum(self.waiting) >= _BYTES_AT_ONCE:
            self.settle()

    def settle(self) -> None:
        """Wait until everything sent is acknowledged.

        Raises:
            OSError: it is not, and nothing ever was.
            StoppedError: it is not.
        """
        try:
            self.writer.sync()
            counts = self.writer.counts
            if counts.durable < self.num:
                raise OSError(
                    f"{self.num - counts.durable} records were not acknowledged"
                    + (f", {counts.dropped} of them dropped" if counts.dropped else "")
                )
        except OSError as error:
            self._stop(error)
        self.sent.sent += len(self.waiting)
        self.sent.sent_bytes += sum(self.waiting)
        self.waiting.clear()

    def _stop(self, error: OSError) -> NoReturn:
        """A destination that has taken nothing is not reached at all, or refuses everything."""
        if not self.sent.sent:
            raise error
        raise StoppedError(self.sent, error) from error

    def _pace(self) -> None:
        if self.rate is None:
            return
        pause_s = self.began_s + self.num / self.rate - time.monotonic()
        if pause_s > _LONG_PAUSE_S and self.waiting:
            self.settle()
        while (left_s := self.began_s + self.num / self.rate - time.monotonic()) > 0:
            time.sleep(min(left_s, 1.0))
            self.writer.tend()
