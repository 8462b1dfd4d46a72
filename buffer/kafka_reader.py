"""Trace readers on Kafka: one that reads everything from its own offsets, and members of groups.

Offsets of records in a partition of ``PREFIX.traces`` have no gaps, because nothing is compacted
and nobody writes transactions there: whatever is missing at the front was evicted, and is counted.
Members are those of a consumer group; what they committed is in Kafka, with the number of records
that the group has lost as its metadata.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import (
    CommitFailedError,
    IllegalGenerationError,
    KafkaError,
    KafkaTimeoutError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)

from buffer.counts import ReaderCounts
from buffer.deletions import Deletions, DeletionWatch
from buffer.interface import MAX_READ_BYTES, Location, Offsets, Record, RecordReader
from buffer.kafka_claims import KafkaClaims
from buffer.kafka_deletions import DeletionLog
from buffer.kafka_fetch import held_ends
from buffer.kafka_group import Membership, Place, places_of
from buffer.kafka_link import KafkaLink, close_consumer, kafka_errors
from buffer.kafka_parts import KafkaParts, writer_of
from buffer.seen import Identity

log = logging.getLogger(__name__)

_AT_ONCE = 64  # messages of one poll
_POLL_MS = 50
_STAY_EVERY_S = 0.1
_REJOIN = (
    CommitFailedError,
    IllegalGenerationError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)


@dataclass(slots=True)
class _Seen:
    """What a reader knows of a partition."""

    end: int = 0
    """One past its newest record when it was looked at last."""
    began: int | None = None
    """Offset from which it is read, until that was compared with what the partition holds."""
    is_anew: bool = False
    """The brokers have forgotten its records since the reader was opened."""


class KafkaReader(RecordReader):
    """Reads all partitions, or those that its group gives it."""

    def __init__(
        self,
        link: KafkaLink,
        offsets: Offsets | None,
        group: str | None,
        *,
        shows_deleted: bool = False,
    ) -> None:
        """
        Args:
            shows_deleted: return deleted records like any others.
        """
        self._link = link
        self._topic = link.topic("traces")
        self._places = places_of(offsets)
        self._group = None if group is None else Membership(link, group, dict(offsets or {}))
        self._claims = None if group is None else KafkaClaims(link, group)
        self._ready: dict[int, deque[Any]] = {}
        """Messages that were fetched and not returned, by partition."""
        self._turn = 0
        self._seen: defaultdict[int, _Seen] = defaultdict(_Seen)
        """What is known of each partition."""
        self._consumer: KafkaConsumer | None = None
        self._parts = KafkaParts(link)
        self._deletions = DeletionWatch(Deletions if shows_deleted else DeletionLog(link).follow)
        self.on_deleted: Callable[[int, int], None] | None = None
        """Told partition and offset of each record that is passed over because it was deleted."""
        self._counts = ReaderCounts()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def counts(self) -> ReaderCounts:
        return self._counts

    def offsets(self) -> dict[str, Any]:
        if self._group is not None and self._group.predecessor:
            return self._group.predecessor
        places = {str(partition): place.to_json() for partition, place in self._places.items()}
        return places if self._group is None else {**places, "member": self._group.member}

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        records: list[Record] = []
        with self._lock, kafka_errors(f"{self._link.address.location} cannot be read"):
            if not self._has_partitions():
                return []
            self._turn += 1
            self._deletions.look()
            try:
                while len(records) < max_records and max_bytes > 0 and self._has_ready():
                    record = self._next()
                    if record is not None:
                        records.append(record)
                        max_bytes -= len(record.payload)
            except KafkaError:
                if not records:
                    raise
            self._take_note()
        self._counts = replace(self._counts, read=self._counts.read + len(records))
        return records

    def bounds(self) -> dict[int, range]:
        """Offsets of the records that each partition holds now, whatever end the brokers name."""
        with self._lock, kafka_errors(f"{self._link.address.location} cannot be read"):
            if not self._has_partitions():
                return {}
            assert self._consumer is not None
            partitions = [TopicPartition(self._topic, number) for number in self._ready]
            begins = self._consumer.beginning_offsets(partitions)
            ends = held_ends(self._link, begins, self._consumer.end_offsets(partitions))
        return {one.partition: range(begins[one], ends[one]) for one in partitions}

    def commit(self, offsets: Offsets) -> None:
        if self._group is None:
            raise ValueError("a reader without a group has nothing to commit")
        with self._lock, kafka_errors(f"{self._link.address.location}: nothing was committed"):
            places = {n: one for n, one in places_of(offsets).items() if self._is_of_now(n, one)}
            deadline_s = time.monotonic() + self._link.options.timeout_s
            while places and self._has_partitions():
                assert self._consumer is not None
                try:
                    self._settle({n: one for n, one in places.items() if n in self._ready})
                    self._group.commit(self._consumer, places)
                    break
                except _REJOIN:  # what we hold stays ours: commit once we have joined again
                    if time.monotonic() > deadline_s:
                        raise
                    self._poll(_POLL_MS)
            self._take_note()

    def claim(self, found: Sequence[tuple[Record, Identity]]) -> list[bool]:
        if self._claims is None:
            return super().claim(found)
        # A writer's records are in one partition, which is what is committed.
        placed = [
            (replace(one, payload=b"", writer=one.location.partition("-")[0]), trace)
            for one, trace in found
        ]
        with self._lock, kafka_errors(f"{self._link.address.location}: nothing is claimed"):
            return self._claims.claim(placed, self._is_gone)

    def _is_gone(self, location: Location, member: str) -> bool:
        """Whether a record of a partition of ours was evicted: the member that had it is dead, or
        the partition would still be its."""
        number, offset = int(location[0]), int(location[1].partition("-")[2])
        if self._consumer is None or number not in self._ready:
            return False
        partition = TopicPartition(self._topic, number)
        begin: int = self._consumer.beginning_offsets([partition])[partition]
        return offset < begin

    def _settle(self, places: dict[int, Place], *, are_learnt: bool = False) -> None:
        assert self._claims is not None
        ends = {str(number): (number, place.next) for number, place in places.items()}
        self._claims.settle(ends, are_learnt=are_learnt)

    def _is_of_now(self, number: int, place: Place) -> bool:
        """Not from before the brokers forgot the partition: committed, such a place would let the
        group pass over as many new records."""
        now = self._places.get(number)
        return not self._seen[number].is_anew or now is None or place.next <= now.next

    def stay(self) -> None:
        """Remain a member, and take part when partitions are shared out, while nobody reads."""
        with self._lock, contextlib.suppress(KafkaError):
            consumer = self._consumer
            if consumer is None or self._group is None or not consumer.subscription():
                return
            consumer.pause(*consumer.assignment())
            self._poll(1)
            consumer.resume(*consumer.assignment())
            self._take_note()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            consumer, self._consumer = self._consumer, None
            self._ready.clear()
            self._parts.close()
            if self._claims is not None:
                self._claims.close()
            if consumer is not None:
                close_consumer(consumer)

    # ---- which partitions ----------------------------------------------------------------------

    def _has_partitions(self) -> bool:
        """Connect and take partitions if need be. False while nobody has made the topic.

        Raises:
            KafkaError: the brokers do not answer, or the group does not settle.
        """
        if self._consumer is None:
            self._consumer = self._new_consumer()
            if self._group is not None:
                threading.Thread(
                    target=_stay, args=(weakref.ref(self), self._closed), name="kafka", daemon=True
                ).start()
        found = self._consumer.partitions_for_topic(self._topic)
        if not found:
            return False
        if self._group is None:
            self._assign(self._consumer, found)
        else:
            if self._group.predecessor:
                self._settle(places_of(self._group.predecessor), are_learnt=True)
            if self._group.join(self._consumer, self._topic):
                self._follow(self._consumer)
        return True

    def _new_consumer(self) -> KafkaConsumer:
        return self._link.consumer(
            self,
            **({} if self._group is None else self._group.settings),
            auto_offset_reset="earliest",
            check_crcs=False,  # records have checksums of their own; a bad one stops no reader
            max_partition_fetch_bytes=4 << 20,
            fetch_max_bytes=16 << 20,
        )

    def _assign(self, consumer: KafkaConsumer, found: set[int]) -> None:
        """Read all partitions that there are."""
        if found <= self._ready.keys():
            return
        consumer.assign([TopicPartition(self._topic, number) for number in sorted(found)])
        for number in found:
            self._begin(consumer, number, self._places.get(number, Place()))

    def _follow(self, consumer: KafkaConsumer) -> None:
        """Read the partitions that the group has given us, from where it is in each."""
        assert self._group is not None
        assigned = {partition.partition for partition in consumer.assignment()}
        self._places = {n: place for n, place in self._places.items() if n in assigned}
        self._ready = {n: ready for n, ready in self._ready.items() if n in assigned}
        for number, committed in self._group.committed(consumer, assigned).items():
            self._begin(consumer, number, max(committed, self._places.get(number, Place())))

    def _take_note(self) -> None:
        """Let the group know what we hold."""
        if self._group is not None and self._consumer is not None:
            self._group.note(self._consumer, self._places)

    def _begin(self, consumer: KafkaConsumer, number: int, place: Place) -> None:
        self._places[number], self._seen[number].began = place, place.next
        self._ready[number] = deque()
        consumer.seek(TopicPartition(self._topic, number), place.next)

    # ---- records -------------------------------------------------------------------------------

    def _has_ready(self) -> bool:
        """Whether there is a message to return; fetches until there is one or all were read."""
        if self._readable() or (self._poll(1) and self._readable()):
            return True
        deadline_s = time.monotonic() + self._link.options.timeout_s
        while not self._has_all():
            if self._poll(_POLL_MS) and self._readable():
                return True
            if time.monotonic() > deadline_s:
                raise KafkaTimeoutError("there are records, but none arrives")
        return False

    def _readable(self) -> list[int]:
        """Partitions with messages to return."""
        released = () if self._group is None else self._group.released
        return [n for n, messages in self._ready.items() if messages and n not in released]

    def _poll(self, wait_ms: int) -> bool:
        """Fetch some messages; True if there are any."""
        consumer = self._consumer
        assert consumer is not None
        found = consumer.poll(timeout_ms=wait_ms, max_records=_AT_ONCE)
        if self._group is not None and self._group.join(consumer, self._topic):
            self._follow(consumer)  # and fetch again from there
            return False
        for partition, messages in found.items():
            self._ready[partition.partition].extend(messages)
        return bool(found)

    def _has_all(self) -> bool:
        """Whether all records there are were returned. Counts what was evicted unread."""
        consumer = self._consumer
        assert consumer is not None
        released = () if self._group is None else self._group.released
        partitions = [
            TopicPartition(self._topic, number) for number in self._ready if number not in released
        ]
        if not partitions:
            return True
        begins = consumer.beginning_offsets(partitions)
        ends = consumer.end_offsets(partitions)
        for partition in partitions:
            number, begin, end = partition.partition, begins[partition], ends[partition]
            seen = self._seen[number]
            is_beyond = seen.began == self._places[number].next > end  # nothing came from there
            seen.began = None
            if is_beyond and end >= seen.end:  # or the brokers hold more than they say
                ends |= held_ends(self._link, {partition: begin}, {partition: end})
                is_beyond = self._places[number].next > ends[partition]
            if is_beyond or end < seen.end:
                self._warn_of_loss(number)
                self._has_begun_anew(number, begin)
                self._begin(consumer, number, self._places[number])
            seen.end = end
            if begin > self._places[number].next:
                self._loses(number, begin - self._places[number].next)
                consumer.seek(partition, begin)
        return all(self._places[p.partition].next >= ends[p] for p in partitions)

    def _warn_of_loss(self, number: int) -> None:
        log.warning(
            "%s lost records of partition %d that it had acknowledged; reading it from the start",
            self._link.address.location,
            number,
        )

    def _has_begun_anew(self, number: int, offset: int) -> None:
        """The brokers have forgotten a partition; go on at this offset. What the group committed
        before says nothing of the records that are there now."""
        place = self._places[number]
        lost = min(place.lost, offset)
        self._places[number] = Place(offset, lost, min(place.deleted, offset - lost))
        self._seen[number].is_anew = True
        if self._group is not None:
            self._group.begins_anew(number)

    def _loses(self, number: int, num_records: int) -> None:
        """So many records at our place were evicted before we read them."""
        place, counts = self._places[number], self._counts
        self._places[number] = replace(
            place, next=place.next + num_records, lost=place.lost + num_records
        )
        self._counts = replace(counts, evicted_unread=counts.evicted_unread + num_records)

    def _next(self) -> Record | None:
        """The next message as a record; ``None`` if it cannot be read any more."""
        numbers = self._readable()
        number = numbers[self._turn % len(numbers)]
        message = self._ready[number][0]
        payload = self._parts.record_of(message)
        self._ready[number].popleft()
        if message.offset < self._places[number].next:  # Kafka has begun this partition anew
            self._has_begun_anew(number, message.offset)
        self._loses(number, message.offset - self._places[number].next)
        place = self._places[number]
        is_deleted = payload is not None and self._deletions.latest.covers_record(payload)
        self._places[number] = Place(
            message.offset + 1, place.lost + (payload is None), place.deleted + is_deleted
        )
        if payload is None:
            self._counts = replace(self._counts, damaged=self._counts.damaged + 1)
            return None
        if is_deleted:
            self._counts = replace(self._counts, deleted=self._counts.deleted + 1)
            if self.on_deleted is not None:
                self.on_deleted(number, message.offset)
            return None
        return Record(payload, writer_of(message), f"{number}-{message.offset}")


def _stay(reader: weakref.ref[KafkaReader], closed: threading.Event) -> None:
    """Keep a reader in its group until it is closed or gone."""
    while not closed.wait(_STAY_EVERY_S) and (found := reader()) is not None:
        found.stay()
        del found
