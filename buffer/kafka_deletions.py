"""Deletion of a tenant's records on Kafka, which removes no single record.

``PREFIX.deleted`` has one partition and is kept for ever: each message names the digest of a tenant
and until when it was deleted, or ``null`` if that was taken back; the newest holds. Readers follow
it and pass over what it covers; brokers hold that until the retention of ``PREFIX.traces`` ends.
"""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaTimeoutError

from buffer.deletions import Deletions
from buffer.kafka_fetch import wait_until_shown
from buffer.kafka_link import KafkaLink, close_consumer
from buffer.kafka_sender import Sender
from buffer.small_json import is_whole, parse_small_json

_COMPACTED = {"cleanup.policy": "compact"}
"""The newest message of a tenant stays."""


class DeletionLog:
    """Follows the list of deletions, and appends to it. May be used by several threads."""

    def __init__(self, link: KafkaLink) -> None:
        self._link = link
        self._partition = TopicPartition(link.topic("deleted"), 0)
        self._consumer: KafkaConsumer | None = None
        self._sender: Sender | None = None
        self._deletions = Deletions()
        self._next = 0
        self._lock = threading.Lock()

    def follow(self) -> Deletions:
        """The list of now.

        Raises:
            KafkaError: the brokers do not answer.
        """
        with self._lock:
            return self._follow()

    def put(self, digest: str, until_ms: int | None) -> None:
        """List a tenant, whatever was listed of it before, or take it off the list.

        Args:
            digest: of its name.
            until_ms: until when it was deleted, unix ms; ``None``: its deletion is taken back.

        Raises:
            KafkaError: it may or may not be listed.
            OSError: the topic cannot be created.
        """
        with self._lock:
            if self._sender is None:
                self._sender = Sender(self._link, "deleted", _COMPACTED)
            message = json.dumps({"tenant": digest, "until_ms": until_ms}).encode()
            sent = self._sender.send(digest.encode(), message)
            offset: int = sent.get(self._link.options.timeout_s).offset

            def is_shown() -> bool:
                self._follow()
                return self._next > offset

            wait_until_shown(is_shown, self._link.options.timeout_s)

    def _follow(self) -> Deletions:
        if self._consumer is None:
            self._consumer = self._link.consumer(self, auto_offset_reset="earliest")
        consumer, partition = self._consumer, self._partition
        if not consumer.partitions_for_topic(partition.topic):
            return self._deletions
        if not consumer.assignment():
            consumer.assign([partition])
            consumer.seek(partition, self._next)
        end = consumer.end_offsets([partition])[partition]
        while self._next < end:
            found = consumer.poll(timeout_ms=self._link.timeout_ms)
            if not found:
                raise KafkaTimeoutError("there are deletions, but none arrives")
            for message in found[partition]:
                self._next = message.offset + 1
                self._take(message.value)
        return self._deletions

    def _take(self, value: Any) -> None:
        """One message; what makes no sense changes nothing."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            stored = parse_small_json(value)
            digest, until_ms = stored["tenant"], stored["until_ms"]
            if isinstance(digest, str) and (until_ms is None or is_whole(until_ms)):
                found = self._deletions.without(digest)  # the newest message of a tenant holds
                self._deletions = found if until_ms is None else found.with_tenant(digest, until_ms)


def clear_quarantine(link: KafkaLink, before_ms: int | None = None) -> int:
    """Delete records that were put aside: nobody can tell whose they are.

    Args:
        before_ms: unix ms; only those put aside before. ``None``: all.

    Returns:
        How many they were.

    Raises:
        KafkaError: the brokers do not delete, or do not answer.
    """
    partition = TopicPartition(link.topic("unreadable"), 0)
    consumer = link.consumer(link, auto_offset_reset="earliest")
    try:
        if not consumer.partitions_for_topic(partition.topic):
            return 0
        begin: int = consumer.beginning_offsets([partition])[partition]
        end: int = consumer.end_offsets([partition])[partition]
        if before_ms is not None and end > begin:
            found = consumer.offsets_for_times({partition: before_ms})[partition]
            end = end if found is None else found.offset
    finally:
        close_consumer(consumer)
    if end > begin:
        with link.admin() as admin:
            admin.delete_records({partition: end})
    return end - begin
