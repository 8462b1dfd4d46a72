"""A buffer in the memory of one process, ``memory:NAME``, for tests.

Everything that opens the same name in this process shares one buffer. Other processes cannot
see it, so a server and a trainer started by their commands need another backend.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from buffer.claims import Claims
from buffer.counts import BufferStats, GroupCounts, ReaderCounts, WriterCounts
from buffer.deletions import Deleted, Deletions, Ends, digest_of, may_be_of, owner_of
from buffer.interface import (
    MAX_READ_BYTES,
    MAX_UNREADABLE_BYTES,
    Backend,
    Location,
    Offsets,
    Payload,
    Record,
    RecordReader,
    Report,
    TraceLimits,
    TraceWriter,
    Unreadable,
    check_record,
)
from buffer.memory_held import Appended, Held, Share, Stream
from buffer.memory_weights import MemoryWeights
from buffer.seen import Identity
from buffer.version_rules import check_group
from configs.urls import shown_url

DEFAULT_BYTES = 1 << 30
"""What a buffer holds where ``max_bytes`` leaves it open."""


_BUFFERS: defaultdict[str, Held] = defaultdict(Held)
"""Buffers of this process by name."""


class MemoryBackend(Backend):
    """The buffer ``NAME`` of this process."""

    def __init__(self, url: str, run_dir: Path) -> None:
        name = url.removeprefix("memory:")
        if not name:
            raise ValueError("buffer.url must name the buffer, as in 'memory:test'")
        if any(letter in name for letter in "?#@"):
            raise ValueError("buffer.url: the name of a buffer in memory has no '?', '#' or '@'")
        self._url = shown_url(url)
        self._held = _BUFFERS[name]

    @classmethod
    def private(cls) -> Self:
        """A buffer that no name leads to."""
        made = cls.__new__(cls)
        made._url, made._held = "memory:", Held()
        return made

    @property
    def ends_with_process(self) -> bool:
        return True

    def open_named_writer(self, name: str, limits: TraceLimits) -> MemoryWriter:
        """A writer whose stream has this name."""
        return MemoryWriter(self._held, limits, name)

    def open_trace_writer(self, limits: TraceLimits) -> MemoryWriter:
        return MemoryWriter(self._held, limits)

    def open_record_reader(
        self, offsets: Offsets | None = None, group: str | None = None
    ) -> MemoryReader | MemoryMember:
        if group is None:
            return MemoryReader(self._held, offsets)
        check_group(group)
        return MemoryMember(self._held, group, offsets)

    def fetch(self, locations: Collection[Location]) -> dict[Location, Payload]:
        with self._held.lock:
            found = {at: self._record_at(*at) for at in locations}
        return {at: payload for at, payload in found.items() if payload is not None}

    def _record_at(self, name: str, location: str) -> bytes | None:
        stream = self._held.streams.get(name)
        is_number = location.isascii() and location.isdigit()
        record = stream.records.get(int(location)) if stream is not None and is_number else None
        return None if record is None else record.payload

    def keep_unreadable(self, name: str, payload: Payload) -> None:
        with self._held.lock:
            kept = self._held.unreadable
            used = sum(len(one.payload or b"") for one in kept.values())
            if used + len(payload) <= MAX_UNREADABLE_BYTES:
                kept[name] = Appended(bytes(payload), time.time())

    def unreadable(self) -> list[Unreadable]:
        with self._held.lock:
            return [
                Unreadable(name, len(kept.payload or b""))
                for name, kept in self._held.unreadable.items()
            ]

    def open_weights(self, line: str = "") -> MemoryWeights:
        if not line:
            return MemoryWeights(self._held, self._url)
        with self._held.lock:
            return MemoryWeights(self._held.lines.setdefault(line, Held()), f"{self._url} ({line})")

    def delete(self, tenant: str, *, until_ms: int | None = None) -> Deleted:
        held, records, num_bytes = self._held, 0, 0
        ends, digest = Ends(), digest_of(tenant)
        with held.lock:
            for stream in held.streams.values():
                for number, record in stream.records.items():
                    owner = None if record.payload is None else owner_of(record.payload)
                    if record.payload is None or owner is None:
                        continue
                    if ends.see(owner, tenant):
                        stream.records[number] = replace(record, payload=None)
                        records, num_bytes = records + 1, num_bytes + len(record.payload)
            held.num_bytes -= num_bytes
            aside = held.unreadable.items()
            theirs = [name for name, one in aside if may_be_of(tenant, one.payload or b"")]
            for name in theirs:
                del held.unreadable[name]
            held.deletions = held.deletions.with_tenant(digest, ends.until_ms(until_ms))
            listed_ms = held.deletions.until_ms[digest]
        return Deleted(records, num_bytes, len(theirs), until_ms=listed_ms)

    def undelete(self, digest: str) -> bool:
        with self._held.lock:
            was_listed = digest in self._held.deletions.until_ms
            self._held.deletions = self._held.deletions.without(digest)
        return was_listed

    def deletions(self) -> Deletions:
        return self._held.deletions

    def expire(self, limits: TraceLimits) -> None:
        max_bytes = DEFAULT_BYTES if limits.max_bytes is None else limits.max_bytes
        with self._held.lock:
            evict(self._held, limits.ttl_s, max_bytes)

    def stats(self) -> BufferStats:
        held = self._held
        with held.lock:
            streams = held.streams.values()
            deleted = sum(map(_num_deleted, streams))
            return BufferStats(
                num_writers=len(held.streams),
                appended=sum(stream.end for stream in streams),
                held=sum(len(stream.records) for stream in streams) - deleted,
                held_bytes=held.num_bytes,
                groups=tuple(_counts_of(name, held) for name in sorted(held.groups)),
                deleted=deleted,
            )

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        return ()


class MemoryWriter(TraceWriter):
    """Appends to a stream of its own; records are stored at once and acknowledged by ``sync``."""

    def __init__(self, held: Held, limits: TraceLimits, name: str | None = None) -> None:
        self._held = held
        self._limits = limits
        self._max_bytes = DEFAULT_BYTES if limits.max_bytes is None else limits.max_bytes
        with held.lock:
            self._name = f"w{len(held.streams)}" if name is None else name
            self._stream = held.streams.setdefault(self._name, Stream())
        self._durable = self._evicted_records = self._evicted_bytes = 0
        self._pending_since = 0.0

    @property
    def name(self) -> str:
        return self._name

    @property
    def counts(self) -> WriterCounts:
        durable = self._durable
        appended = self._stream.end  # last: another thread may ask, and none is owed to it then
        return WriterCounts(
            appended,
            durable,
            appended - durable,
            0,
            self._evicted_records,
            self._evicted_bytes,
        )

    def append(self, payload: Payload) -> int:
        check_record(len(payload), self._max_bytes)
        with self._held.lock:
            number = self._stream.end
            if number == self._durable:
                self._pending_since = time.monotonic()
            self._stream.records[number] = Appended(bytes(payload), time.time())
            self._stream.end = number + 1
            self._held.num_bytes += len(payload)
            self._evict()
        return number

    def sync(self) -> range:
        newly = range(self._durable, self._stream.end)
        self._durable = self._stream.end
        return newly

    def tend(self) -> range:
        newly = range(self._durable, self._durable)
        if time.monotonic() - self._pending_since >= self._limits.sync_interval_s:
            newly = self.sync()
        with self._held.lock:
            self._evict()
        return newly

    def close(self) -> None:
        self.sync()

    def _evict(self) -> None:
        records, num_bytes = evict(self._held, self._limits.ttl_s, self._max_bytes)
        self._evicted_records += records
        self._evicted_bytes += num_bytes


def evict(held: Held, ttl_s: float, max_bytes: int) -> tuple[int, int]:
    """Delete the oldest records until the rest fit and none is older than the TTL, and what was
    put aside before that.

    Returns:
        How many records they were, and their bytes.
    """
    expired_s, records, evicted_bytes = time.time() - ttl_s, 0, 0
    for name in [name for name, one in held.unreadable.items() if one.appended_s <= expired_s]:
        del held.unreadable[name]
    while oldest := min(filter(_has_records, held.streams.values()), key=_oldest_s, default=None):
        if _oldest_s(oldest) > expired_s and held.num_bytes <= max_bytes:
            break
        num_bytes = len(oldest.records.pop(oldest.first).payload or b"")
        oldest.first += 1
        held.num_bytes -= num_bytes
        records, evicted_bytes = records + 1, evicted_bytes + num_bytes
    return records, evicted_bytes


def _has_records(stream: Stream) -> bool:
    return stream.first < stream.end


def _num_deleted(stream: Stream) -> int:
    return sum(record.payload is None for record in stream.records.values())


def _oldest_s(stream: Stream) -> float:
    return stream.records[stream.first].appended_s


class MemoryReader(RecordReader):
    """Follows all streams of a buffer. An offset is the number of the next record."""

    def __init__(self, held: Held, offsets: Offsets | None = None) -> None:
        for name, number in (offsets or {}).items():
            if type(number) is not int:
                raise ValueError(f"offsets of {name!r} must be a record number, got {number!r}")
        self._held = held
        self._next: dict[str, int] = dict(offsets or {})
        self._turn = 0
        self._read = self._evicted_unread = self._deleted = 0

    @property
    def counts(self) -> ReaderCounts:
        return ReaderCounts(
            read=self._read, evicted_unread=self._evicted_unread, deleted=self._deleted
        )

    def offsets(self) -> dict[str, int]:
        return dict(self._next)

    def commit(self, offsets: Offsets) -> None:
        raise ValueError("a reader without a group has nothing to commit")

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        records: list[Record] = []
        with self._held.lock:
            unread = self._unread()
            while len(records) < max_records and max_bytes > 0:
                record = next(unread, None)
                if record is None:
                    break
                records.append(record)
                max_bytes -= len(record.payload)
        self._read += len(records)
        return records

    def _unread(self) -> Iterator[Record]:
        """Unread records, one stream after another; each call starts with another stream."""
        names = list(self._held.streams)
        self._turn += 1
        for index in range(len(names)):
            name = names[(self._turn + index) % len(names)]
            stream, number = self._held.streams[name], self._next.get(name, 0)
            self._evicted_unread += max(stream.first - number, 0)
            self._next[name] = max(number, stream.first)
            while self._next[name] < stream.end:
                number = self._next[name]
                self._next[name] = number + 1
                payload = stream.records[number].payload
                if payload is None:
                    self._deleted += 1
                else:
                    yield Record(payload, name, str(number))


class MemoryMember(RecordReader):
    """A member of a group. Its offsets are its name and how many records it has got, so whoever
    opens a member with them succeeds it."""

    def __init__(self, held: Held, group: str, offsets: Offsets | None = None) -> None:
        match dict(offsets or {}):
            case nothing if not nothing:
                self._predecessor = None
            case {"member": str(member), "handed": int(handed)}:
                self._predecessor = member, handed
            case _:
                raise ValueError(f"offsets of a member must hold member and handed, got {offsets}")
        self._held = held
        self._group = group
        self._name = secrets.token_hex(8)
        self._handed = 0
        self._read = self._evicted_unread = self._deleted = 0

    @property
    def counts(self) -> ReaderCounts:
        return ReaderCounts(
            read=self._read, evicted_unread=self._evicted_unread, deleted=self._deleted
        )

    def offsets(self) -> dict[str, Any]:
        return {"member": self._name, "handed": self._handed}

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        records: list[Record] = []
        with self._held.lock:
            if self._predecessor is not None:
                self._commit(*self._predecessor)
                self._leave(self._predecessor[0])
                self._predecessor = None
            shares = self._held.groups.setdefault(self._group, {})
            for writer, stream in self._held.streams.items():
                share = shares.setdefault(writer, Share())
                while len(records) < max_records and max_bytes > 0:
                    number = self._next_number(writer, share, stream)
                    if number is None:
                        break
                    payload = stream.records[number].payload
                    if payload is None:
                        share.deleted += 1
                        self._deleted += 1
                        continue
                    share.in_hand[number] = self._name, self._handed
                    self._handed += 1
                    records.append(Record(payload, writer, str(number)))
                    max_bytes -= len(payload)
        self._read += len(records)
        return records

    def commit(self, offsets: Offsets) -> None:
        match dict(offsets):
            case {"member": str(member), "handed": int(handed)}:
                with self._held.lock:
                    self._commit(member, handed)
            case _:
                raise ValueError("a member commits its name and how many records it has got")

    def claim(self, found: Sequence[tuple[Record, Identity]]) -> list[bool]:
        with self._held.lock:
            return [self._claim((one.writer, one.location), trace) for one, trace in found]

    def _claim(self, location: Location, trace: Identity) -> bool:
        claims = self._claims()
        rival = claims.rival_of(location, trace)
        if rival is not None and self._is_gone(rival):
            claims.drop(rival)
        return claims.claim(location, trace)

    def _claims(self) -> Claims:
        return self._held.claims.setdefault(self._group, Claims())

    def _is_gone(self, location: Location) -> bool:
        writer, number = location[0], int(location[1])
        share = self._held.groups.get(self._group, {}).get(writer, Share())
        stream = self._held.streams.get(writer, Stream())
        return number not in share.in_hand and number not in stream.records

    def close(self) -> None:
        with self._held.lock:
            self._leave(self._name)

    def _next_number(self, writer: str, share: Share, stream: Stream) -> int | None:
        """Number of the next record to hand out; what was evicted before counts as lost."""
        while share.left:
            number = next(iter(share.left))
            del share.left[number]
            if number in stream.records:
                return number
            self._claims().drop((writer, str(number)))
            self._has_lost(share, 1)
        if share.next < stream.first:
            self._has_lost(share, stream.first - share.next)
            share.next = stream.first
        if share.next == stream.end:
            return None
        share.next += 1
        return share.next - 1

    def _has_lost(self, share: Share, num_records: int) -> None:
        share.lost += num_records
        self._evicted_unread += num_records

    def _commit(self, member: str, handed: int) -> None:
        for writer, share in self._held.groups.get(self._group, {}).items():
            for records in (share.in_hand, share.left):
                done = [n for n, (who, at) in records.items() if who == member and at < handed]
                for number in done:
                    del records[number]
                    self._claims().commit((writer, str(number)))
                share.committed += len(done)

    def _leave(self, member: str) -> None:
        for share in self._held.groups.get(self._group, {}).values():
            left = {n: one for n, one in share.in_hand.items() if one[0] == member}
            for number in left:
                del share.in_hand[number]
            share.left = dict(sorted((share.left | left).items()))


def _counts_of(group: str, held: Held) -> GroupCounts:
    committed = pending = lost = deleted = 0
    for writer, stream in held.streams.items():
        share = held.groups[group].get(writer, Share())
        gone = max(0, stream.first - share.next) + sum(n not in stream.records for n in share.left)
        ahead = (*share.left, *range(max(share.next, stream.first), stream.end))
        blank = sum(n in stream.records and stream.records[n].payload is None for n in ahead)
        committed += share.committed
        lost += share.lost + gone
        deleted += share.deleted + blank
        pending += stream.end - share.committed - share.lost - gone - share.deleted - blank
    return GroupCounts(group, committed, pending, lost, deleted)
