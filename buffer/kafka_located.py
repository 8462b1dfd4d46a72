"""Records of the trace topic at known locations, without reading what lies between them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence

from kafka import KafkaConsumer, TopicPartition

from buffer.interface import Location, Payload
from buffer.kafka_fetch import fetch_at, held_ends
from buffer.kafka_link import KafkaLink, close_consumer
from buffer.kafka_parts import KafkaParts, writer_of

_LOCATION = re.compile(r"([0-9]{1,9})-([0-9]{1,18})")
"""Partition and offset, as ``KafkaReader`` gives them."""
_DENSE, _DENSE_FETCH_BYTES = 4, 4 << 20
"""If at least every fourth record is wanted, what lies between them is read, too."""
_SPARSE_FETCH_BYTES = 64 << 10
"""Otherwise an answer ends here, or behind the first batch, which brokers send whole."""


def records_at(link: KafkaLink, locations: Collection[Location]) -> dict[Location, Payload]:
    """The records at these locations. Missing are those that were evicted, or are of another writer
    because the topic was made anew, and locations that no reader gives.

    Raises:
        KafkaError: the brokers do not answer.
    """
    wanted: dict[int, dict[int, set[Location]]] = defaultdict(lambda: defaultdict(set))
    for writer, location in locations:
        parts = _LOCATION.fullmatch(location)
        if parts is not None and location == f"{int(parts[1])}-{int(parts[2])}":
            wanted[int(parts[1])][int(parts[2])].add((writer, location))
    found = dict[Location, Payload]()
    for number, by_offset in sorted(wanted.items()):
        found |= _in_partition(link, number, by_offset)
    return found


def _in_partition(
    link: KafkaLink, number: int, by_offset: dict[int, set[Location]]
) -> dict[Location, Payload]:
    offsets = sorted(by_offset)
    consumer, parts = _consumer(link, offsets), KafkaParts(link)
    try:
        partition = TopicPartition(link.topic("traces"), number)
        if number not in (consumer.partitions_for_topic(partition.topic) or ()):
            return {}
        found = dict[Location, Payload]()
        ends = consumer.end_offsets([partition])
        if offsets[-1] >= ends[partition]:  # gone, or the brokers hold more than they say
            ends = held_ends(link, consumer.beginning_offsets([partition]), ends)
        timeout_s, end = link.options.timeout_s, ends[partition]
        for message in fetch_at(consumer, partition, offsets, timeout_s, end=end):
            location = writer_of(message), f"{number}-{message.offset}"
            if location in by_offset[message.offset]:
                payload = parts.record_of(message)
                if payload is not None:
                    found[location] = payload
        return found
    finally:
        parts.close()
        close_consumer(consumer)


def _consumer(link: KafkaLink, offsets: Sequence[int]) -> KafkaConsumer:
    """A consumer for records that lie as dense as these."""
    is_dense = offsets[-1] - offsets[0] < _DENSE * len(offsets)
    most_bytes = _DENSE_FETCH_BYTES if is_dense else _SPARSE_FETCH_BYTES
    return link.consumer(
        link,
        auto_offset_reset="none",
        check_crcs=False,  # as ``KafkaReader``
        max_partition_fetch_bytes=most_bytes,
        fetch_max_bytes=most_bytes,
    )
