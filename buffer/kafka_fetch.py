"""Messages of a partition by their offsets, and where a partition really ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaTimeoutError, OffsetOutOfRangeError

from buffer.kafka_link import KafkaLink, close_consumer

_MOST_OF_A_BATCH = 1 << 20  # messages
_UNSEEN_S = 0.02  # between two looks for a message


def held_ends(
    link: KafkaLink, begins: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]
) -> dict[TopicPartition, int]:
    """Ends of partitions by the messages that the brokers hand out.

    Kafka's own brokers name the offset behind the last message. Tansu names the one behind the
    *first* message of the last batch, and hands out the rest of that batch all the same.

    Args:
        begins: offset of the oldest message of each partition.
        ends: as the brokers name them.

    Returns:
        The larger one of both, for each partition.

    Raises:
        KafkaError: the brokers do not answer.
    """
    found = dict(ends)
    wanted = {one for one, end in ends.items() if end > begins[one]}
    if not wanted:
        return found
    consumer = link.consumer(link, auto_offset_reset="none", check_crcs=False)
    try:
        consumer.assign(sorted(wanted))
        for one in wanted:
            consumer.seek(one, ends[one] - 1)
        while wanted:
            arrived = _poll(consumer, link.options.timeout_s, _MOST_OF_A_BATCH)
            for one, messages in arrived.items():
                found[one] = max(found[one], messages[-1].offset + 1)
                consumer.pause(one)
                wanted.discard(one)
    except OffsetOutOfRangeError:  # evicted meanwhile: nothing is left that could be beyond
        pass
    finally:
        close_consumer(consumer)
    return found


def fetch_at(
    consumer: KafkaConsumer,
    partition: TopicPartition,
    offsets: Sequence[int],
    timeout_s: float,
    *,
    end: int | None = None,
) -> Iterator[Any]:
    """Messages at these offsets, without those that are gone.

    Args:
        consumer: used by nobody else meanwhile.
        partition: an existing one.
        offsets: ascending.
        timeout_s: longest time without an answer, seconds.
        end: one past the newest message; ``None``: as the brokers name it.

    Raises:
        KafkaError: the brokers do not answer.
    """
    consumer.assign([partition])
    begin = consumer.beginning_offsets([partition])[partition]
    if end is None:
        end = consumer.end_offsets([partition])[partition]
    at = -1
    ready: deque[Any] = deque()
    for offset in offsets:
        if offset < begin:
            continue
        if offset >= end:
            return
        while ready and ready[0].offset < offset:
            ready.popleft()
        if not ready:
            if at != offset:
                consumer.seek(partition, offset)
            ready.extend(_poll_one(consumer, partition, timeout_s))
            at = ready[-1].offset + 1 if ready else -1
            if not ready:  # evicted meanwhile, and perhaps more
                begin = consumer.beginning_offsets([partition])[partition]
        if ready and ready[0].offset == offset:
            yield ready.popleft()


def wait_until_shown(is_shown: Callable[[], bool], timeout_s: float) -> None:
    """Look again and again for a message that the brokers have acknowledged: it may show a moment
    later.

    Args:
        is_shown: follows the topic, and says whether the message was there.
        timeout_s: longest time, seconds.

    Raises:
        KafkaError: the brokers do not answer, or do not show it in this time.
    """
    until_s = time.monotonic() + timeout_s
    while not is_shown():
        if time.monotonic() > until_s:
            raise KafkaTimeoutError("the brokers do not show what they have acknowledged")
        time.sleep(_UNSEEN_S)


def _poll_one(consumer: KafkaConsumer, partition: TopicPartition, timeout_s: float) -> list[Any]:
    """Some messages; none if the place is out of range."""
    try:
        return _poll(consumer, timeout_s, max_records=4)[partition]
    except OffsetOutOfRangeError:
        return []


def _poll(
    consumer: KafkaConsumer, timeout_s: float, max_records: int
) -> dict[TopicPartition, list[Any]]:
    """Some messages, of one partition at least.

    Raises:
        KafkaTimeoutError: none arrives.
    """
    found: dict[TopicPartition, list[Any]] = consumer.poll(
        timeout_ms=round(timeout_s * 1000), max_records=max_records
    )
    if not found:
        raise KafkaTimeoutError("there are records, but none arrives")
    return found
