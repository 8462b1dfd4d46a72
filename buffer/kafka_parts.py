"""What a message of the trace topic holds: a record, or where the parts of a large one are."""

from __future__ import annotations

import re
from typing import Any, cast

from kafka import KafkaConsumer, TopicPartition

from buffer.kafka_fetch import fetch_at
from buffer.kafka_link import PARTS_HEADER, KafkaLink, close_consumer
from buffer.small_json import parse_small_json

MAX_RECORD_BYTES = 1 << 30
_MOST_REFERENCE_BYTES = 8 << 20
"""Longer records in pieces are not believed."""
_WRITER = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def writer_of(message: Any) -> str:
    """Name of the writer of a record."""
    found = message.key if _WRITER.fullmatch(message.key or b"") else b"unknown"
    return str(found.decode())


class KafkaParts:
    """Joins the pieces of large records."""

    def __init__(self, link: KafkaLink) -> None:
        self._link = link
        self._consumer: KafkaConsumer | None = None

    def record_of(self, message: Any) -> bytes | None:
        """The record that a message is or stands for; ``None`` if not all of it is there.

        Raises:
            KafkaError: the brokers do not answer.
        """
        if PARTS_HEADER not in message.headers:
            return cast("bytes | None", message.value)
        where = _decode_reference(message.value)
        if where is None:
            return None
        number, offsets, num_bytes = where
        if self._consumer is None:
            self._consumer = self._link.consumer(
                self, auto_offset_reset="none", check_crcs=False, max_partition_fetch_bytes=4 << 20
            )
        partition = TopicPartition(self._link.topic("parts"), number)
        if number not in (self._consumer.partitions_for_topic(partition.topic) or ()):
            return None
        found = [
            one.value
            for one in fetch_at(self._consumer, partition, offsets, self._link.options.timeout_s)
            if one.key == message.key
        ]
        whole = b"".join(found)
        return whole if len(found) == len(offsets) and len(whole) == num_bytes else None

    def close(self) -> None:
        if self._consumer is not None:
            close_consumer(self._consumer)


def _decode_reference(content: bytes | None) -> tuple[int, list[int], int] | None:
    """Partition and offsets of the pieces, and bytes of the whole; ``None`` if it is no reference
    that one of our writers would make."""
    try:
        stored = parse_small_json(content or b"", _MOST_REFERENCE_BYTES)
    except ValueError:
        return None
    match stored:
        case {"partition": int(number), "offsets": [*offsets], "num_bytes": int(num_bytes)}:
            ascending = all(type(one) is int for one in offsets) and offsets == sorted(set(offsets))
            if number >= 0 and ascending and 0 < num_bytes <= MAX_RECORD_BYTES:
                return number, offsets, num_bytes
    return None
