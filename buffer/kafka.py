"""The buffer on a Kafka cluster, ``kafka://HOST:PORT/PREFIX``: see ``kafka_link.py`` for the URL,
and docs/buffer.md for what it guarantees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kafka import TopicPartition
from kafka.errors import KafkaError

from buffer.counts import BufferStats, GroupCounts
from buffer.interface import (
    MAX_UNREADABLE_BYTES,
    Backend,
    Offsets,
    Payload,
    Report,
    TraceLimits,
)
from buffer.kafka_group import Place, places_of
from buffer.kafka_link import MESSAGE_ROOM, KafkaLink, close_now, kafka_errors, parse_url
from buffer.kafka_reader import KafkaReader
from buffer.kafka_weights import KafkaWeights
from buffer.kafka_writer import KafkaWriter
from buffer.version_rules import check_group

_RECORDS_AT_ONCE = 64


class KafkaBackend(Backend):
    """Traces and weights in the topics of one prefix."""

    def __init__(self, url: str, run_dir: Path) -> None:
        self._link = KafkaLink(parse_url(url))

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

    def open_weights(self) -> KafkaWeights:
        return KafkaWeights(self._link)

    def stats(self) -> BufferStats:
        """Reads all records, because Kafka keeps no count of their bytes."""
        reader = KafkaReader(self._link, None, None)
        try:
            writers, held, held_bytes = set[str](), 0, 0
            while records := reader.read(_RECORDS_AT_ONCE):
                writers |= {record.writer for record in records}
                held += len(records)
                held_bytes += sum(len(record.payload) for record in records)
            ends = {number: place.next for number, place in places_of(reader.offsets()).items()}
            begins = {number: place.lost for number, place in places_of(reader.offsets()).items()}
        finally:
            reader.close()
        with kafka_errors(f"{self._link.address.location}: groups cannot be read"):
            groups = self._groups(begins, ends)
        return BufferStats(len(writers), sum(ends.values()), held, held_bytes, groups)

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        return ()

    def _groups(self, begins: dict[int, int], ends: dict[int, int]) -> tuple[GroupCounts, ...]:
        prefix = self._link.group("")
        with self._link.admin() as admin:
            names = sorted(
                one["group_id"] for one in admin.list_groups() if one["group_id"].startswith(prefix)
            )
            stored = admin.list_group_offsets(names) if names else {}
        return tuple(
            _counts_of(name.removeprefix(prefix), self._places(stored[name]), begins, ends)
            for name in names
        )

    def _places(self, stored: dict[TopicPartition, Any]) -> dict[int, Place]:
        topic = self._link.topic("traces")
        return {
            partition.partition: Place.from_commit(committed)
            for partition, committed in stored.items()
            if partition.topic == topic and committed.offset >= 0
        }


def _counts_of(
    group: str, places: dict[int, Place], begins: dict[int, int], ends: dict[int, int]
) -> GroupCounts:
    """What a group has committed, has before it and has lost.

    Args:
        group: its name.
        places: what it has committed, by partition.
        begins: offset of the oldest record of each partition.
        ends: one past that of the newest.
    """
    committed = pending = lost = 0
    for number, end in ends.items():
        place = places.get(number, Place())
        gone = max(0, begins[number] - place.next)
        committed += place.next - place.lost
        lost += place.lost + gone
        pending += end - place.next - gone
    return GroupCounts(group, committed, pending, lost)
