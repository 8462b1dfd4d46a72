"""Reads traces from Redis, from offsets of its own: everything that is stored, leaving no mark."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from buffer.counts import ReaderCounts
from buffer.interface import MAX_READ_BYTES, Offsets, Record, RecordReader, ServiceAwayError
from buffer.redis_batches import (
    Batch,
    Entry,
    batches_key,
    ends_key,
    id_of,
    number_of,
    numbers_of,
    payload_of,
    records_key,
    removed_key,
)
from buffer.redis_client import RedisClient

T = TypeVar("T")

FETCH_BYTES = 1 << 20
"""What one round trip aims to bring; records differ, so it may be more. At 4 MiB the memory of the
answer comes fresh from the system each time, which costs more than the round trips."""
_ASK_S = 0.1
MAX_FETCH = 64
"""Most records of one writer in one round trip."""
WRITERS_AT_ONCE = 16
"""Writers asked in one round trip."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A record that has arrived and was not handed out yet."""

    record: Record
    number: int
    num_evicted: int
    """Records right before it that were evicted."""
    num_deleted: int
    """Records right before it that were deleted."""
    num_damaged: int
    """Records right before it that the server has lost otherwise."""


class Ends:
    """How many records each writer has stored, asked anew when all that is known was read."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._known: dict[str, int] = {}
        self._asked_s = -math.inf

    def ahead_of(self, reached: Mapping[str, int]) -> dict[str, int]:
        """Counts by writer; not older than ``_ASK_S``, unless there is something beyond
        ``reached`` (number of the next record by writer), and then not much older."""
        age_s = time.monotonic() - self._asked_s
        is_ahead = any(end > reached.get(name, 0) for name, end in self._known.items())
        if not is_ahead or age_s >= _ASK_S:
            self._known = ends_of(self._client)
            self._asked_s = time.monotonic()
        return self._known


class LastFetch:
    """The records that came last, which say how many to ask for next.

    They are kept until the next ones have come. If the caller let go of all of them before that,
    the C library would return their memory to the system, and every page of it would be faulted in
    again: half of the time that reading takes.
    """

    def __init__(self) -> None:
        self._records: list[Record] = []

    def how_many(self, num_writers: int) -> int:
        """Records to ask each of so many writers for."""
        num_bytes = sum(len(record.payload) for record in self._records)
        mean_bytes = num_bytes // len(self._records) if self._records else 64 << 10
        return max(1, min(MAX_FETCH, FETCH_BYTES // max(1, mean_bytes * num_writers)))

    def brought(self, records: list[Record]) -> None:
        if records:
            self._records = records


def hand_out(
    fetched: deque[T],
    fetch: Callable[[], None],
    take: Callable[[T], Record],
    max_records: int,
    max_bytes: int,
) -> list[Record]:
    """The next records, fetched as they are needed.

    Args:
        fetched: what has arrived.
        fetch: appends to it, if there is anything new.
        take: the record of what is handed out.

    Raises:
        ServiceAwayError: nothing had arrived, and nothing can be fetched.
    """
    records: list[Record] = []
    while len(records) < max_records and max_bytes > 0:
        if not fetched:
            try:
                fetch()
            except ServiceAwayError:
                if records:
                    break  # what has arrived is handed out; the next call meets the error
                raise
        if not fetched:
            break
        records.append(take(fetched.popleft()))
        max_bytes -= len(records[-1].payload)
    return records


class RedisReader(RecordReader):
    """Follows the streams of all writers. An offset is the number of the next record."""

    def __init__(self, client: RedisClient, offsets: Offsets | None = None) -> None:
        for name, number in (offsets or {}).items():
            if type(number) is not int or number < 0:
                raise ValueError(f"offsets of {name!r} must be a record number, got {number!r}")
        self._client = client
        self._next: dict[str, int] = dict(offsets or {})
        """Writer -> number of the next record to be handed out."""
        self._fetched: deque[Fetched] = deque()
        self._ends = Ends(client)
        self._last = LastFetch()
        self._turn = 0
        self._read = self._damaged = self._evicted_unread = self._deleted = 0

    @property
    def counts(self) -> ReaderCounts:
        return ReaderCounts(
            read=self._read,
            damaged=self._damaged,
            evicted_unread=self._evicted_unread,
            deleted=self._deleted,
        )

    def offsets(self) -> dict[str, int]:
        return dict(self._next)

    def commit(self, offsets: Offsets) -> None:
        raise ValueError("a reader without a group has nothing to commit")

    def close(self) -> None:
        self._client.close()

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        return hand_out(self._fetched, self._fetch, self._hand_out, max_records, max_bytes)

    def _hand_out(self, fetched: Fetched) -> Record:
        self._next[fetched.record.writer] = fetched.number + 1
        self._evicted_unread += fetched.num_evicted
        self._deleted += fetched.num_deleted
        self._damaged += fetched.num_damaged
        self._read += 1
        return fetched.record

    def _fetch(self) -> None:
        """Ask writers that have something new, each time beginning with another."""
        ends = self._ends.ahead_of(self._next)
        behind = sorted(name for name, end in ends.items() if end > self._next.get(name, 0))
        self._turn += 1
        turn = self._turn % max(1, len(behind))
        names = [*behind[turn:], *behind[:turn]][:WRITERS_AT_ONCE]
        if not names:
            return
        count = self._last.how_many(len(names))
        options = self._client.options
        answers = self._client.at_once(
            (
                *("XRANGE", records_key(options, name), id_of(self._next.get(name, 0)), "+"),
                *("COUNT", count),
            )
            for name in names
        )
        for name, entries in zip(names, answers, strict=True):
            self._take(name, entries, ends[name] if len(entries) < count else None)
        self._last.brought([fetched.record for fetched in self._fetched])

    def _take(self, name: str, entries: list[Entry], end: int | None) -> None:
        """Queue a writer's records.

        Args:
            end: number of records that it had stored before it was asked, if these are all that
                are left of them.
        """
        number = self._next.get(name, 0)
        for entry_id, fields in entries:
            found = number_of(entry_id)
            missing = self._missing(name, number, found)
            record = Record(payload_of(fields), name, str(found))
            self._fetched.append(Fetched(record, found, *missing))
            number = found + 1
        if end is not None and end > number and not entries:
            evicted, deleted, damaged = self._missing(name, number, end)
            self._evicted_unread += evicted
            self._deleted += deleted
            self._damaged += damaged
            self._next[name] = end

    def _missing(self, name: str, number: int, found: int) -> tuple[int, int, int]:
        """How many of the records from ``number`` to ``found`` were evicted, how many deleted, and
        how many are gone for another reason."""
        if found == number:
            return 0, 0, 0
        first = first_held(self._client, name)
        evicted = found - number if first is None else max(0, min(found, first) - number)
        deleted = num_deleted(self._client, name, number + evicted, found)
        return evicted, deleted, found - number - evicted - deleted


def ends_of(client: RedisClient) -> dict[str, int]:
    """Number of records that each writer has ever stored."""
    key = ends_key(client.options)
    return numbers_of(client.call("HGETALL", key), key)


def num_deleted(client: RedisClient, writer: str, first: int, end: int) -> int:
    """How many of the records from ``first`` to ``end`` were deleted with their tenant."""
    found: int = client.call("ZCOUNT", removed_key(client.options, writer), first, end - 1)
    return min(found, end - first)


def first_held(client: RedisClient, writer: str) -> int | None:
    """Number of the oldest record of a writer that was not evicted; ``None``: there is none."""
    entries = client.call("XRANGE", batches_key(client.options, writer), "-", "+", "COUNT", 1)
    return Batch.of(entries[0]).first if entries else None
