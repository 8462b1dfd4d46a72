"""Lists the records that readers of a Kafka buffer have put aside."""

from __future__ import annotations

from collections.abc import Iterator

from kafka import TopicPartition

from buffer.interface import Unreadable
from buffer.kafka_fetch import fetch_at
from buffer.kafka_link import KafkaLink, close_consumer


def list_unreadable(link: KafkaLink) -> Iterator[Unreadable]:
    """What topic ``unreadable`` holds, oldest first; nothing if there is no such topic.

    Raises:
        KafkaError: the brokers do not answer.
    """
    consumer = link.consumer(link, auto_offset_reset="earliest")
    try:
        partition = TopicPartition(link.topic("unreadable"), 0)
        if not consumer.partitions_for_topic(partition.topic):
            return
        begin = consumer.beginning_offsets([partition])[partition]
        end = consumer.end_offsets([partition])[partition]
        for message in fetch_at(consumer, partition, range(begin, end), link.options.timeout_s):
            name = (message.key or b"").decode(errors="replace")
            yield Unreadable(name, len(message.value or b""))
    finally:
        close_consumer(consumer)
