"""Sends messages to a topic that is kept for ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kafka import KafkaProducer

from buffer.kafka_link import KafkaLink, close_now


class Sender:
    """A producer for one topic of one partition that is kept forever, one message a batch."""

    def __init__(self, link: KafkaLink, topic: str, configs: Mapping[str, str]) -> None:
        self._link = link
        self._topic = topic
        self._configs = {"retention.ms": "-1", "retention.bytes": "-1", **configs}
        self._producer: KafkaProducer | None = None
        self._last: Any = None

    def send(self, key: bytes | None, value: bytes | memoryview | None) -> Any:
        """A future of the stored message.

        Raises:
            KafkaError: the brokers do not answer.
            OSError: the topic cannot be created.
        """
        if self._producer is not None and self._last is not None and self._last.failed():
            close_now(self._producer)  # it sends nothing after a failure
            self._producer = None
        if self._producer is None:
            self._link.ensure_topic(self._topic, 1, self._configs)
            self._producer = self._link.producer(
                self, batch_size=1, delivery_timeout_ms=self._link.timeout_ms
            )
        self._last = self._producer.send(self._link.topic(self._topic), value, key, partition=0)
        return self._last
