"""Members of a group share the traces in Redis by its consumer groups.

Redis remembers which member has which record. A member that gives no sign of life loses what it has
not committed to another one. XAUTOCLAIM would go by the time since a record was handed out, and a
trainer holds records for as long as it takes to its next checkpoint; so XCLAIM takes them, from
members that are not alive.

A member appears as several consumers, one for new records and one for each dead consumer whose
records it takes over. Each is handed the records of one writer in ascending order, so a single
number says how far it has come: offsets are ``{writer: {consumer: one past its last record}}``.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from buffer.counts import ReaderCounts
from buffer.interface import (
    MAX_READ_BYTES,
    Location,
    Offsets,
    Record,
    RecordReader,
    ServiceAwayError,
)
from buffer.redis_batches import Entry, number_of, payload_of
from buffer.redis_client import RedisClient
from buffer.redis_group import Consumer, Pending, RedisGroup
from buffer.redis_presence import Presence, alive_members, end_presence
from buffer.redis_reader import (
    WRITERS_AT_ONCE,
    Ends,
    LastFetch,
    first_held,
    hand_out,
    num_deleted,
)
from buffer.seen import Identity
from buffer.version_rules import check_group

_LOOK_S = 1.0
"""Seconds between two looks for what dead members left."""
_LEAST_IDLE_MS = 100
"""Records handed out less than this ago are not claimed: another member may just have done so."""
_FORGOTTEN_MS = 3_600_000
"""A dead consumer that has nothing is removed after this time."""
_COMMIT_AT_ONCE = 1000

_Key = tuple[str, str]
"""Writer and consumer."""


class RedisMember(RecordReader):
    """A member of a group."""

    def __init__(self, client: RedisClient, group: str, offsets: Offsets | None = None) -> None:
        check_group(group)
        self._resumed = {name: _consumers_of(name, at) for name, at in (offsets or {}).items()}
        self._client = client
        self._group = RedisGroup(client, group)
        self._own = _OwnNames()
        self._known: dict[str, int] = {}
        """Writer -> number up to which the group has been handed everything, as far as known."""
        self._fetched: deque[tuple[_Key, int, Record]] = deque()
        self._arrived: dict[_Key, int] = {}
        """One past the number of the last record that arrived."""
        self._handed: dict[_Key, deque[int]] = {}
        """Numbers that were handed out and not committed, ascending."""
        self._ends = Ends(client)
        self._last = LastFetch()
        self._next_look_s = 0.0
        self._presence: Presence | None = None
        self._counts = ReaderCounts()
        self._lock = threading.Lock()
        """Guards all of the above."""

    @property
    def counts(self) -> ReaderCounts:
        return self._counts

    def offsets(self) -> dict[str, dict[str, int]]:
        with self._lock:
            found: dict[str, dict[str, int]] = {}
            for (writer, consumer), numbers in self._handed.items():
                if numbers:
                    found.setdefault(writer, {})[consumer] = numbers[-1] + 1
            return found

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        with self._lock:
            records = hand_out(self._fetched, self._fetch, self._hand_out, max_records, max_bytes)
            self._counts = replace(self._counts, read=self._counts.read + len(records))
        return records

    def _hand_out(self, fetched: tuple[_Key, int, Record]) -> Record:
        key, number, record = fetched
        self._handed.setdefault(key, deque()).append(number)
        return record

    def commit(self, offsets: Offsets) -> None:
        with self._lock:
            self._commit({name: _consumers_of(name, at) for name, at in offsets.items()})

    def claim(self, found: Sequence[tuple[Record, Identity]]) -> list[bool]:
        with self._lock:
            return self._group.claims.claim(found, self._is_gone)

    def _is_gone(self, location: Location) -> bool:
        return not self._group.is_pending(location[0], int(location[1]))

    def close(self) -> None:
        with self._lock:
            if self._presence is not None:
                self._presence.end()
                self._presence = None
            self._client.close()

    # ---- committing ----------------------------------------------------------------------------

    def _commit(self, offsets: dict[str, dict[str, int]]) -> None:
        for writer, consumers in offsets.items():
            for consumer, end in consumers.items():
                handed = self._handed.get((writer, consumer))
                if handed is None:
                    self._commit_of_predecessor(writer, consumer, end)
                    continue
                done = list(takewhile(end.__gt__, handed))
                self._group.claims.commit(writer, done)
                for _ in done:
                    handed.popleft()

    def _commit_of_predecessor(self, writer: str, consumer: str, end: int) -> None:
        first = 0
        while first < end:
            pending = self._group.pending(writer, consumer, first, _COMMIT_AT_ONCE)
            numbers = [one.number for one in pending if one.number < end]
            if not numbers:
                return
            self._group.claims.commit(writer, numbers)
            first = numbers[-1] + 1

    # ---- fetching ------------------------------------------------------------------------------

    def _fetch(self) -> None:
        if self._presence is None:
            self._join()
        ends = self._ends.ahead_of(self._known)
        if time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + _LOOK_S
            self._take_over(sorted(ends))
        if not self._fetched:
            self._take_new(ends)
        self._last.brought([record for _, _, record in self._fetched])

    def _join(self) -> None:
        """Become visible, and succeed the reader whose offsets these are."""
        self._presence = Presence(self._client, self._own.member)
        try:
            self._commit(self._resumed)
            for consumers in self._resumed.values():
                for consumer in consumers:
                    end_presence(self._client, member_of(consumer))
        except ServiceAwayError:
            self._presence.end()
            self._presence = None
            raise
        self._resumed = {}

    def _take_new(self, ends: dict[str, int]) -> None:
        behind = [name for name, end in ends.items() if end > self._known.get(name, 0)]
        names = self._own.in_turn(sorted(behind))[:WRITERS_AT_ONCE]
        if names and self._take_from(names, ends):
            self._take_from(names, ends)

    def _take_from(self, names: list[str], ends: dict[str, int]) -> bool:
        """Take new records of these writers; True if it made the group for one of them instead."""
        count = self._last.how_many(len(names))
        try:
            found = self._group.take_new(self._own.main, names, count)
        except ServiceAwayError:
            self._own.replace_main()
            self._next_look_s = 0.0
            raise
        for writer, handed in found.items():
            if handed is None:
                continue
            last = self._queue(writer, self._own.main, handed.entries)
            self._known[writer] = ends[writer]
            if last is not None:
                gone = last + 1 - handed.before - len(handed.entries)
                deleted = gone and num_deleted(self._client, writer, handed.before, last + 1)
                self._missed(gone - min(gone, deleted), min(gone, deleted))
                if len(handed.entries) == count:
                    self._known[writer] = last + 1
        return None in found.values()

    def _missed(self, num_evicted: int, num_deleted: int) -> None:
        """So many records are gone before they were handed out."""
        counts = self._counts
        self._counts = replace(
            counts,
            evicted_unread=counts.evicted_unread + num_evicted,
            deleted=counts.deleted + num_deleted,
        )

    def _queue(self, writer: str, consumer: str, entries: list[Entry]) -> int | None:
        """Records that arrived; returns the number of the last one."""
        number = None
        for entry_id, fields in entries:
            number = number_of(entry_id)
            record = Record(payload_of(fields), writer, str(number))
            self._fetched.append(((writer, consumer), number, record))
        if number is not None:
            self._arrived[writer, consumer] = number + 1
        return number

    # ---- taking over ---------------------------------------------------------------------------

    def _take_over(self, writers: list[str]) -> None:
        """Claim some of what dead members have."""
        consumers = self._group.consumers(writers)
        others = {member_of(one.name) for one in consumers} - {self._own.member}
        alive = alive_members(self._client, others) | {self._own.member}
        for one in consumers:
            is_left = one.name in self._own.unheard or member_of(one.name) not in alive
            if is_left and one.num_pending:
                self._claim_from(one)
            elif is_left and one.idle_ms > _FORGOTTEN_MS:
                self._group.remove(one)

    def _claim_from(self, dead: Consumer) -> None:
        is_own = dead.name in self._own.unheard
        first = self._arrived.get((dead.writer, dead.name), 0) if is_own else 0
        pending = self._group.pending(dead.writer, dead.name, first, self._last.how_many(1))
        if not is_own:
            pending = list(takewhile(_is_idle, pending))
        if not pending:
            return
        numbers = [one.number for one in pending]
        consumer = self._own.successor_of(dead)
        idle_ms = 0 if is_own else min(one.idle_ms for one in pending)
        try:
            entries = self._group.claim(dead.writer, consumer, numbers, idle_ms)
        except ServiceAwayError:
            self._own.give_up_successor_of(dead)
            raise
        self._queue(dead.writer, consumer, entries)
        self._next_look_s = 0.0  # there may be more
        if len(entries) < len(numbers):
            held = first_held(self._client, dead.writer)
            gone = [number for number in numbers if held is None or number < held]
            self._group.claims.drop(dead.writer, gone)
            self._missed(len(gone), 0)


class _OwnNames:
    """Names of one member and of its consumers."""

    def __init__(self) -> None:
        self.member = f"m{os.getpid()}-{secrets.token_hex(6)}"
        self._count = 0
        self._turn = 0
        self._successors: dict[_Key, str] = {}
        self.unheard: set[str] = set()
        """Consumers that may have been handed records that never arrived."""
        self.main = self._new()
        """The consumer that is handed new records."""

    def replace_main(self) -> None:
        """An answer to ``main`` was lost."""
        self.unheard.add(self.main)
        self.main = self._new()

    def successor_of(self, dead: Consumer) -> str:
        """The consumer that takes over from a dead one."""
        return self._successors.setdefault((dead.writer, dead.name), self._new())

    def give_up_successor_of(self, dead: Consumer) -> None:
        """An answer to it was lost."""
        self.unheard.add(self._successors.pop((dead.writer, dead.name)))

    def in_turn(self, names: list[str]) -> list[str]:
        """The names, beginning with another each time, so that no writer is starved."""
        self._turn += 1
        turn = self._turn % max(1, len(names))
        return [*names[turn:], *names[:turn]]

    def _new(self) -> str:
        self._count += 1
        return f"{self.member}.{self._count}"


def member_of(consumer: str) -> str:
    """The member that a consumer belongs to."""
    return consumer.rpartition(".")[0]


def _is_idle(pending: Pending) -> bool:
    return pending.idle_ms >= _LEAST_IDLE_MS


def _consumers_of(writer: str, position: Any) -> dict[str, int]:
    if isinstance(position, dict) and all(
        isinstance(name, str) and type(end) is int for name, end in position.items()
    ):
        return dict(position)
    raise ValueError(f"offsets of {writer!r} must be record numbers by consumer, got {position!r}")
