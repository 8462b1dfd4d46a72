"""The buffer on a Kafka cluster, ``kafka://HOST:PORT/PREFIX``: see ``kafka_link.py`` for the URL,
and docs/buffer.md for what it guarantees."""

from __future__ import annotations

import bisect
import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError

from buffer.counts import BufferStats, GroupCounts
from buffer.deletions import Deleted, Deletions, Ends, digest_of, now_ms, owner_of
from buffer.interface import (
    MAX_UNREADABLE_BYTES,
    Backend,
    Location,
    Offsets,
    Payload,
    Record,
    Report,
    TraceLimits,
    Unreadable,
)
from buffer.kafka_deletions import DeletionLog, clear_quarantine
from buffer.kafka_group import Place, places_of
from buffer.kafka_link import (
    MESSAGE_ROOM,
    KafkaLink,
    close_now,
    kafka_errors,
    parse_url,
    reason_of,
)
from buffer.kafka_located import records_at
from buffer.kafka_reader import KafkaReader
from buffer.kafka_unreadable import list_unreadable
from buffer.kafka_weights import KafkaWeights
from buffer.kafka_writer import KafkaWriter
from buffer.version_rules import check_group

_RECORDS_AT_ONCE = 64
_REMAINS = (
    "Kafka removes no single record: the brokers hold them until the retention of the topic, "
    "buffer.ttl_s, ends; readers pass over them"
)


class KafkaBackend(Backend):
    """Traces and weights in the topics of one prefix."""

    def __init__(self, url: str, run_dir: Path) -> None:
        self._link = KafkaLink(parse_url(url))
        self._deletion_log = DeletionLog(self._link)

    @property
    def spool_bytes(self) -> int:
        return self._link.options.spool_bytes

    def open_trace_writer(self, limits: TraceLimits) -> KafkaWriter:
        """A writer that connects when it first sends: a cluster that is away delays no start."""
        return KafkaWriter(self._link, limits)

    def open_record_reader(
        self, offsets: Offsets | None = None, group: str | None = None
    ) -> KafkaReader:
        places_of(offsets)
        if group is not None:
            check_group(group)
        return KafkaReader(self._link, offsets, group)

    def fetch(self, locations: Collection[Location]) -> dict[Location, Payload]:
        with kafka_errors(f"{self._link.address.location} cannot be read"):
            return records_at(self._link, locations)

    def keep_unreadable(self, name: str, payload: Payload) -> None:
        link = self._link
        configs = {"retention.bytes": str(MAX_UNREADABLE_BYTES), "cleanup.policy": "delete"}
        if len(payload) > link.options.message_bytes - MESSAGE_ROOM:
            return
        with contextlib.suppress(KafkaError, OSError):  # it costs the evidence, not the trainer
            link.ensure_topic("unreadable", 1, configs)
            producer = link.producer(self, delivery_timeout_ms=link.timeout_ms)
            try:
                sent = producer.send(link.topic("unreadable"), payload, name.encode(), partition=0)
                sent.get(link.options.timeout_s)
            finally:
                close_now(producer)

    def unreadable(self) -> list[Unreadable]:
        where = f"{self._link.address.location}: what was put aside cannot be read"
        with kafka_errors(where):
            return list(list_unreadable(self._link))

    def open_weights(self, line: str = "") -> KafkaWeights:
        address = self._link.address
        if not line:
            return KafkaWeights(self._link)
        return KafkaWeights(KafkaLink(replace(address, prefix=f"{address.prefix}.{line}")))

    def delete(self, tenant: str, *, until_ms: int | None = None) -> Deleted:
        """Lists the tenant: readers pass over its records, which the brokers hold until retention
        removes them."""
        link, remains, quarantined = self._link, _REMAINS, 0
        ends, digest = Ends(), digest_of(tenant)
        with kafka_errors(f"{link.address.location}: a deletion may not be listed"):
            before = self._deletion_log.follow()
        reader, records, num_bytes = KafkaReader(link, None, None, shows_deleted=True), 0, 0
        try:
            for record in _held_now(reader):
                owner = owner_of(record.payload)
                if owner is not None and ends.see(owner, tenant):
                    records, num_bytes = records + 1, num_bytes + len(record.payload)
        finally:
            reader.close()
        listed = before.with_tenant(digest, ends.until_ms(until_ms))
        with kafka_errors(f"{link.address.location}: a deletion may not be listed"):
            self._deletion_log.put(digest, listed.until_ms[digest])
        try:
            quarantined = clear_quarantine(link)
        except KafkaError as error:
            remains += f"; what was put aside stays, too ({reason_of(error)})"
        return Deleted(records, num_bytes, quarantined, remains, listed.until_ms[digest])

    def undelete(self, digest: str) -> bool:
        """Readers that come to the tenant's records from now on get them."""
        with kafka_errors(f"{self._link.address.location}: a deletion may not be taken back"):
            if digest not in self._deletion_log.follow().until_ms:
                return False
            self._deletion_log.put(digest, None)
            return True

    def deletions(self) -> Deletions:
        with kafka_errors(f"{self._link.address.location}: deletions cannot be read"):
            return self._deletion_log.follow()

    def expire(self, limits: TraceLimits) -> None:
        """Of put-aside records; writers and the topic's retention see to the others."""
        expired_ms = now_ms() - round(limits.ttl_s * 1000)
        with kafka_errors(f"{self._link.address.location}: old records are not removed"):
            clear_quarantine(self._link, expired_ms)

    def stats(self) -> BufferStats:
        """Reads all records, because Kafka keeps no count of their bytes.

        What was evicted and what the groups have committed is asked before: all of that is among
        the records that are read, however many are written meanwhile.
        """
        reader = KafkaReader(self._link, None, None)
        deleted: defaultdict[int, list[int]] = defaultdict(list)
        reader.on_deleted = lambda partition, offset: deleted[partition].append(offset)
        try:
            before = reader.bounds()
            with kafka_errors(f"{self._link.address.location}: groups cannot be read"):
                groups = self._groups()
            writers, held, held_bytes = set[str](), 0, 0
            for record in _held_now(reader):
                writers.add(record.writer)
                held, held_bytes = held + 1, held_bytes + len(record.payload)
            read = places_of(reader.offsets())
        finally:
            reader.close()
        # Those of groups, too: brokers that have forgotten the topic have none.
        numbers = read.keys() | {number for places in groups.values() for number in places}
        partitions = {
            number: _Partition.of(
                number, before, read.get(number, Place()).next, deleted[number], groups
            )
            for number in numbers
        }
        return BufferStats(
            num_writers=len(writers),
            appended=sum(one.end for one in partitions.values()),
            held=held,
            held_bytes=held_bytes,
            groups=tuple(_counts_of(name, groups[name], partitions) for name in sorted(groups)),
            deleted=sum(map(len, deleted.values())),
            forgotten=sum(one.end - one.known for one in partitions.values()),
        )

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        return ()

    def _groups(self) -> dict[str, dict[int, Place]]:
        """What each group has committed, by partition."""
        prefix = self._link.group("")
        with self._link.admin() as admin:
            names = [
                one["group_id"] for one in admin.list_groups() if one["group_id"].startswith(prefix)
            ]
            stored = admin.list_group_offsets(names) if names else {}
        return {name.removeprefix(prefix): self._places(stored[name]) for name in names}

    def _places(self, stored: dict[TopicPartition, Any]) -> dict[int, Place]:
        topic = self._link.topic("traces")
        return {
            partition.partition: Place.from_commit(committed)
            for partition, committed in stored.items()
            if partition.topic == topic and committed.offset >= 0
        }


@dataclass(frozen=True, slots=True)
class _Partition:
    """Offsets of the records of one partition."""

    begin: int
    """Of the oldest that was not evicted before the groups were looked at."""
    known: int
    """One past the newest that the brokers know of."""
    end: int
    """The same, or where a group is: then the brokers have forgotten records."""
    deleted: list[int]
    """Of those that were deleted, ascending."""

    @classmethod
    def of(
        cls,
        number: int,
        before: Mapping[int, range],
        known: int,
        deleted: list[int],
        groups: Mapping[str, Mapping[int, Place]],
    ) -> _Partition:
        passed = max((one[number].next for one in groups.values() if number in one), default=0)
        begin = before[number].start if number in before else 0
        return cls(min(begin, known), known, max(known, passed), deleted)


def _held_now(reader: KafkaReader) -> Iterator[Record]:
    """The records that the brokers hold at this moment, and a few of those that are written
    meanwhile: a reader that waits for the end may never come there."""
    ends = {number: held.stop for number, held in reader.bounds().items()}
    while True:
        places = places_of(reader.offsets())
        if all(number in places and places[number].next >= end for number, end in ends.items()):
            return
        records = reader.read(_RECORDS_AT_ONCE)
        yield from records
        if not records:
            return


def _counts_of(
    group: str, places: Mapping[int, Place], partitions: Mapping[int, _Partition]
) -> GroupCounts:
    """What a group has committed, has before it, has lost and must pass over.

    Args:
        group: its name.
        places: what it has committed, by partition.
        partitions: what there is.
    """
    committed = pending = lost = deleted = 0
    for number, one in partitions.items():
        place = places.get(number, Place())
        reached = max(place.next, one.begin)
        ahead = len(one.deleted) - bisect.bisect_left(one.deleted, reached)
        forgotten = one.end - max(one.known, reached)
        # A broker that mixes up what commits say must not make a count negative.
        gone = min(place.lost, place.next)
        passed_over = min(place.deleted, place.next - gone)
        committed += place.next - gone - passed_over
        lost += gone + reached - place.next + forgotten
        deleted += passed_over + ahead
        pending += one.end - reached - ahead - forgotten
    return GroupCounts(group, committed, pending, lost, deleted)
