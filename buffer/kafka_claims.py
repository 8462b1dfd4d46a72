"""Claims of one group on Kafka: a topic of one partition, which all members append to and follow.

``PREFIX.claims-GROUP`` holds the messages of ``claims.py``. Kafka puts them into one order, so all
members agree which record was claimed first, and no transaction is needed: a claim belongs to a
record, and whoever gets that record again after a crash has its claim. Old messages are replaced by
``{"up_to": offset, "part": i, "of": n, "messages": [...]}``, which say together what was before
that offset.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from buffer.claims import Claims, SharedClaims
from buffer.kafka_link import KafkaLink, close_consumer
from buffer.kafka_sender import Sender
from buffer.seen import END
from buffer.small_json import parse_small_json

log = logging.getLogger(__name__)

_SHORTEN_AT = 10_000  # messages
_PART_BYTES = 1 << 18
_MOST_BYTES = 1 << 26  # over what 1,000 claims of the longest names take


class KafkaClaims(SharedClaims):
    """One member's end of the topic."""

    def __init__(self, link: KafkaLink, group: str) -> None:
        super().__init__(secrets.token_hex(8))
        name = f"claims-{group}"
        self._link = link
        self._partition = TopicPartition(link.topic(name), 0)
        self._sender = Sender(link, name, {"cleanup.policy": "delete"})
        self._consumer: KafkaConsumer | None = None
        self._next = 0
        """Offset of the next message to follow."""
        self._shorten_at = _SHORTEN_AT

    @contextlib.contextmanager
    def latest(self) -> Iterator[None]:
        """What others append meanwhile comes before what this member appends, and ``append``
        follows both: asking for the end first would cost a second round trip."""
        if self._consumer is None or not self._consumer.assignment():
            self._follow()
        yield

    def refresh(self) -> None:
        self._follow()

    def append(self, messages: Sequence[list[Any]], *, is_durable: bool) -> None:
        sent = [self._sender.send(None, json.dumps(one).encode()) for one in messages]
        offsets = [future.get(self._link.options.timeout_s).offset for future in sent]
        if min(offsets) < self._next:  # the broker has forgotten what was there, and begins anew
            self._next = 0
            self._follow()
        self._follow_to(max(offsets))
        if is_durable:
            with contextlib.suppress(KafkaError):  # it is only longer than it need be
                self._shorten()

    def close(self) -> None:
        """Give the connections back."""
        if self._consumer is not None:
            close_consumer(self._consumer)
            self._consumer = None

    def _follow_to(self, offset: int) -> None:
        """Follow the topic up to a message of ours.

        Raises:
            KafkaError: it does not arrive.
        """
        if self._consumer is None or not self._consumer.assignment():
            self._follow()
        while self._consumer is not None and self._next <= offset:
            found = self._consumer.poll(timeout_ms=self._link.timeout_ms)
            for message in found.get(self._partition, ()):
                if message.offset < self._next:
                    continue
                if message.offset > self._next:  # the broker lost or deleted what was there
                    self._next = 0
                    break
                self._take(_content_of(message.value))
                self._next += 1
            if not found or not self._next:
                self._follow()
                if self._next <= offset:
                    raise KafkaTimeoutError("the brokers do not show what they acknowledged")

    def _follow(self) -> None:
        """Follow the topic to its end.

        Raises:
            KafkaError: the brokers do not answer.
        """
        if self._consumer is None:
            self._consumer = self._link.consumer(self, auto_offset_reset="earliest")
        consumer, partition = self._consumer, self._partition
        if not consumer.partitions_for_topic(partition.topic):
            return
        if not consumer.assignment():
            consumer.assign([partition])
            consumer.seek(partition, self._next)
        end = consumer.end_offsets([partition])[partition]
        if self._next == end:
            return
        begin = consumer.beginning_offsets([partition])[partition]
        if not self._next or not begin <= self._next < end:
            self._start_over(consumer, begin, end)
            return
        for offset, message in self._messages(consumer, self._next, end):
            self._take(message)
            self._next = offset + 1  # the consumer goes on from there, too, if this ends early
        self._next = end

    def _start_over(self, consumer: KafkaConsumer, begin: int, end: int) -> None:
        """Follow the whole topic; what is missing at its front, parts of a state say."""
        consumer.seek(self._partition, begin)
        found = list(self._messages(consumer, begin, end))
        self.claims, start = Claims(self.claims.learnt), begin  # what is learnt stays so
        state = _newest_state(message for _, message in found) if begin else None
        if state is not None:
            start, messages = state
            for message in messages:
                self._take(message)
        elif begin:
            log.warning(
                "%s has lost its first %d messages: traces that were learnt before them may be "
                "learnt again if they are sent again. Set its retention.ms and retention.bytes "
                "to -1",
                *(self._partition.topic, begin),
            )
        for offset, message in found:
            if offset >= start:
                self._take(message)
        self._next = end

    def _messages(self, consumer: KafkaConsumer, begin: int, end: int) -> Iterator[tuple[int, Any]]:
        """Offsets and content of messages from the consumer's place to ``end``."""
        while begin < end:
            found = consumer.poll(timeout_ms=self._link.timeout_ms)
            if not found:
                raise KafkaTimeoutError("there are claims, but none arrives")
            for message in found[self._partition]:
                begin = message.offset + 1
                if message.offset < end:
                    yield message.offset, _content_of(message.value)
        if begin > end:  # more has come meanwhile: it is fetched again
            consumer.seek(self._partition, end)

    def _take(self, message: Any) -> None:
        if not isinstance(message, dict):  # parts of a state say nothing new
            try:
                self.claims.take(message)
            except (TypeError, ValueError) as error:
                log.warning("a message of %s is passed over: %s", self._partition.topic, error)

    def _shorten(self) -> None:
        """Delete old messages if there are many.

        Raises:
            KafkaError: it did not work; nothing is lost.
        """
        assert self._consumer is not None
        begin = self._consumer.beginning_offsets([self._partition])[self._partition]
        if self._next - begin < self._shorten_at:
            return
        up_to, parts = self._next, list(_parts_of(self.claims.messages()))
        self._shorten_at *= 2  # if it does not work, not every commit should try
        about = {"up_to": up_to, "of": len(parts)}
        messages = [{**about, "part": i, "messages": part} for i, part in enumerate(parts)]
        for sent in [self._sender.send(None, json.dumps(one).encode()) for one in messages]:
            sent.get(self._link.options.timeout_s)
        with self._link.admin() as admin:
            admin.delete_records({self._partition: up_to})
        self._shorten_at = _SHORTEN_AT + len(parts)


def _parts_of(messages: Iterable[list[Any]]) -> Iterator[list[list[Any]]]:
    """Messages in lists that fit into one message of the broker each."""
    part, num_bytes = list[list[Any]](), 0
    for message in messages:
        size = len(json.dumps(message))
        if part and num_bytes + size > _PART_BYTES:
            yield part
            part, num_bytes = [], 0
        part.append(message)
        num_bytes += size
    yield part


def _newest_state(messages: Iterable[Any]) -> tuple[int, list[Any]] | None:
    """Offset and messages of the newest state of which all parts are there."""
    found: dict[tuple[int, int], dict[int, Any]] = {}
    for message in messages:
        match message:
            case {"up_to": int(up_to), "of": int(num), "part": int(part), "messages": [*said]}:
                found.setdefault((up_to, num), {})[part] = said
    whole = [key for key, parts in found.items() if parts.keys() == set(range(key[1]))]
    if not whole:
        return None
    parts = found[max(whole)]
    return max(whole)[0], [message for i in sorted(parts) for message in parts[i]]


def _content_of(value: Any) -> Any:
    """A message; ``None`` if it is none of ours."""
    with contextlib.suppress(ValueError):
        return parse_small_json(value or b"", _MOST_BYTES, max_whole=END)
    return None
