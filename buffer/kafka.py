"""The buffer on a Kafka cluster, ``kafka://HOST:PORT/PREFIX``: see ``kafka_link.py`` for the URL,
and docs/buffer.md for what it guarantees."""

from __future__ import annotations

import bisect
import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError

from buffer.counts import BufferStats, GroupCounts
from buffer.deletions import Deleted, Deletions, now_ms, owner_of
from buffer.interface import (
    MAX_UNREADABLE_BYTES,
    Backend,
    Offsets,
    Payload,
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

    def delete(self, tenant: str) -> Deleted:
        """Lists the tenant: readers pass over its records, which the brokers hold until retention
        removes them."""
        link, remains, quarantined = self._link, _REMAINS, 0
        with kafka_errors(f"{link.address.location}: a deletion may not be listed"):
            self._deletion_log.append(tenant)
        reader, records, num_bytes = KafkaReader(link, None, None, shows_deleted=True), 0, 0
        try:
            while found := reader.read(_RECORDS_AT_ONCE):
                theirs = [len(r.payload) for r in found if _is_of(tenant, r.payload)]
                records, num_bytes = records + len(theirs), num_bytes + sum(theirs)
        finally:
            reader.close()
        try:
            quarantined = clear_quarantine(link)
        except KafkaError as error:
            remains += f"; what was put aside stays, too ({reason_of(error)})"
        return Deleted(records, num_bytes, quarantined, remains)

    def deletions(self) -> Deletions:
        with kafka_errors(f"{self._link.address.location}: deletions cannot be read"):
            return self._deletion_log.follow()

    def expire(self, limits: TraceLimits) -> None:
        """Of put-aside records; writers and the topic's retention see to the others."""
        expired_ms = now_ms() - round(limits.ttl_s * 1000)
        with kafka_errors(f"{self._link.address.location}: old records are not removed"):
            clear_quarantine(self._link, expired_ms)

    def stats(self) -> BufferStats:
        """Reads all records, because Kafka keeps no count of their bytes."""
        reader = KafkaReader(self._link, None, None)
        deleted: defaultdict[int, list[int]] = defaultdict(list)
        reader.on_deleted = lambda partition, offset: deleted[partition].append(offset)
        try:
            writers, held, held_bytes = set[str](), 0, 0
            while records := reader.read(_RECORDS_AT_ONCE):
                writers |= {record.writer for record in records}
                held += len(records)
                held_bytes += sum(len(record.payload) for record in records)
            partitions = {
                number: _Partition(place.lost, place.next, deleted[number])
                for number, place in places_of(reader.offsets()).items()
            }
        finally:
            reader.close()
        with kafka_errors(f"{self._link.address.location}: groups cannot be read"):
            groups = self._groups(partitions)
        appended = sum(one.end for one in partitions.values())
        num_deleted = sum(map(len, deleted.values()))
        return BufferStats(len(writers), appended, held, held_bytes, groups, num_deleted)

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        return ()

    def _groups(self, partitions: dict[int, _Partition]) -> tuple[GroupCounts, ...]:
        prefix = self._link.group("")
        with self._link.admin() as admin:
            names = sorted(
                one["group_id"] for one in admin.list_groups() if one["group_id"].startswith(prefix)
            )
            stored = admin.list_group_offsets(names) if names else {}
        return tuple(
            _counts_of(name.removeprefix(prefix), self._places(stored[name]), partitions)
            for name in names
        )

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
    """Of the oldest that was not evicted."""
    end: int
    """One past the newest."""
    deleted: list[int]
    """Of those that were deleted, ascending."""


def _is_of(tenant: str, payload: Payload) -> bool:
    owner = owner_of(payload)
    return owner is not None and owner.tenant == tenant


def _counts_of(
    group: str, places: dict[int, Place], partitions: dict[int, _Partition]
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
        gone = max(0, one.begin - place.next)
        reached = place.next + gone
        ahead = len(one.deleted) - bisect.bisect_left(one.deleted, reached)
        committed += place.next - place.lost - place.deleted
        lost += place.lost + gone
        deleted += place.deleted + ahead
        pending += one.end - reached - ahead
    return GroupCounts(group, committed, pending, lost, deleted)
