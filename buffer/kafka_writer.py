"""The trace writer on Kafka: a bounded queue in memory in front of an idempotent producer.

A record is acknowledged once all in-sync copies have it (``acks=all``). Records of a writer go to
one partition, so that their order holds. While no broker answers, records wait in memory; the
oldest are dropped and counted when ``spool_bytes`` are waiting. A record that is too large for one
message is sent in pieces to another topic, and the message in its place says where they are.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kafka import KafkaProducer, TopicPartition
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
)

from buffer.counts import WriterCounts
from buffer.interface import Payload, ServiceAwayError, TraceLimits, TraceWriter, check_record
from buffer.kafka_link import PARTS_HEADER, KafkaLink, close_now, kafka_errors, reason_of
from buffer.kafka_outbox import Outbox, Waiting

_JITTER = random.Random()  # of its own: the one of the module belongs to the caller

log = logging.getLogger(__name__)

DEFAULT_BYTES = 1 << 30
"""What the topic holds where ``max_bytes`` leaves it open."""

_LEAST_PIECE = 4096
_TEND_WAIT_S = 0.2  # a broker that hangs holds a call of ``tend`` up for so long
_LONGEST_PAUSE_S = 2.0  # between two attempts to connect
_PATIENCE = 3  # times timeout_s without an acknowledgement
_EVICT_AGAIN_S = 60.0  # after a broker refused


class KafkaWriter(TraceWriter):
    """Connects on its first call that sends, and again after every failure."""

    def __init__(self, link: KafkaLink, limits: TraceLimits) -> None:
        self._link = link
        self._limits = limits
        self._max_bytes = DEFAULT_BYTES if limits.max_bytes is None else limits.max_bytes
        self._name = f"w{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._outbox = Outbox(link.options.spool_bytes)
        self._line = _Line(link, self._name, limits, self._max_bytes)
        self._eviction = _Eviction(link, self._max_bytes, limits.ttl_s)
        self._is_closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def counts(self) -> WriterCounts:
        out = self._outbox
        durable, doubtful, dropped, deleted = out.durable, out.doubtful, out.dropped, out.removed
        appended = out.appended  # last: another thread may ask, and none is owed to it then
        return WriterCounts(
            appended,
            durable,
            appended - durable - doubtful - dropped - deleted,
            doubtful,
            self._eviction.num_records,
            self._eviction.num_bytes,
            dropped,
            deleted,
        )

    def append(self, payload: Payload) -> int:
        check_record(len(payload), self._max_bytes)
        if self._outbox.is_full(len(payload)) and self._line.works_well():
            with contextlib.suppress(OSError):  # ``tend`` says so
                self._send_until(time.monotonic() + self._link.options.timeout_s)
        return self._outbox.add(payload)

    def sync(self) -> range:
        deadline_s = time.monotonic() + self._link.options.timeout_s
        while self._outbox.oldest_s is not None:
            problem: str | None = "nobody has answered yet"
            try:
                self._send_until(deadline_s)
            except OSError as error:
                problem = error.strerror
            if self._outbox.oldest_s is not None:
                self._wait_for_line(deadline_s, problem)
        self._eviction.evict()
        return self._outbox.take_acknowledged()

    def tend(self) -> range:
        self._outbox.drop_older(self._limits.ttl_s)
        oldest_s, now_s = self._outbox.oldest_s, time.monotonic()
        if oldest_s is not None:
            is_due = now_s - oldest_s >= self._limits.sync_interval_s
            self._send_until(now_s + _TEND_WAIT_S if is_due else now_s)
            if not is_due:
                return range(0)
        self._eviction.evict()
        return self._outbox.take_acknowledged()

    def remove(self, is_unwanted: Callable[[Payload], bool]) -> int:
        return self._outbox.remove(is_unwanted)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self._outbox.oldest_s is not None:
                self.sync()
        finally:
            self._outbox.give_up()
            self._line.cut()

    def _wait_for_line(self, deadline_s: float, problem: str | None) -> None:
        """Wait until another attempt may be made.

        Raises:
            OSError: not before the deadline.
        """
        now_s = time.monotonic()
        if max(self._line.not_before_s, now_s) >= deadline_s:
            left = len(self._outbox.sent) + len(self._outbox.waiting)
            raise ServiceAwayError(
                errno.ETIMEDOUT,
                f"{left} records are not acknowledged; they are kept and sent again: {problem}",
            )
        time.sleep(max(0.0, self._line.not_before_s - now_s))

    def _send_until(self, deadline_s: float) -> None:
        """Send, and collect acknowledgements, until nothing is left, the time is over, or no
        connection may be tried yet.

        Raises:
            OSError: there is no connection.
        """
        while self._line.is_open():
            self._send()
            ahead = self._ahead()
            left_s = deadline_s - time.monotonic()
            if ahead is None or left_s <= 0:
                return
            with contextlib.suppress(KafkaError):  # ``_collect`` deals with it
                ahead.get(timeout=left_s)
            self._collect()

    def _ahead(self) -> Any:
        """The next future to wait for; ``None`` if there is none."""
        if self._outbox.sent:
            return self._outbox.sent[0].future
        waiting = self._outbox.waiting
        return (
            next((one for one in waiting[0].pieces if not one.is_done), None) if waiting else None
        )

    def _send(self) -> None:
        """Hand over what may be on its way at once."""
        self._collect()
        out = self._outbox
        while out.waiting and out.sent_bytes < self._link.options.in_flight_bytes:
            record = out.waiting[0]
            try:
                is_sent = self._line.send(record)
            except (KafkaError, ValueError) as error:  # ValueError: its partition is gone
                return self._start_again(error)
            if not is_sent:
                return  # its pieces first: those behind must not overtake it
            out.is_sent()

    def _collect(self) -> None:
        """Take note of what the brokers have answered."""
        out = self._outbox
        first = next(iter(out.waiting), None)
        for future in first.pieces if first is not None else ():
            if future.is_done and future.failed():
                return self._start_again(future.exception)
        if self._ahead() is not None and self._line.is_stuck():
            return self._start_again(KafkaTimeoutError("nothing was acknowledged for too long"))
        while out.sent and out.sent[0].future.is_done:
            future = out.sent[0].future
            if future.failed():
                return self._start_again(future.exception)
            record = out.is_acknowledged()
            self._line.works()
            where = future.value
            self._eviction.add(where.partition, where.offset, record)

    def _start_again(self, error: Exception) -> None:
        """Drop the connection: after an error that the client cannot repair, nothing more goes
        through it.

        Raises:
            OSError: always, unless smaller messages may help.
        """
        self._outbox.send_again()
        is_too_large = isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError)
        if is_too_large and self._line.send_less():
            return
        self._line.pause()
        raise ServiceAwayError(
            errno.EIO,
            f"{self._link.address.location} refused traces: {reason_of(error)}; they are kept and "
            f"sent again",
        )


class _Line:
    """The producer, and how often a new one is tried."""

    def __init__(self, link: KafkaLink, name: str, limits: TraceLimits, max_bytes: int) -> None:
        self._link = link
        self._key = name.encode()
        self._limits = limits
        self._max_bytes = max_bytes
        self._producer: KafkaProducer | None = None
        self._partition = 0
        self._most: int | None = None
        """Largest value of a message, bytes; ``None`` until it is known."""
        self._failures = 0
        self._worked_s = 0.0
        """Monotonic time of the last acknowledgement, or of the start."""
        self.not_before_s = 0.0
        """Monotonic time of the next attempt to connect."""

    def is_open(self) -> bool:
        """Whether records can be sent now; connects if it is time to.

        Raises:
            OSError: nobody answers.
        """
        if self._producer is None:
            if time.monotonic() < self.not_before_s:
                return False
            try:
                self._producer = self._new_producer()
            except OSError:
                self.pause()
                raise
            self._worked_s = time.monotonic()
        return True

    def works(self) -> None:
        """Something was acknowledged."""
        self._failures, self._worked_s = 0, time.monotonic()

    def works_well(self) -> bool:
        """Whether waiting for room is worth it: it is open or new, and has answered lately."""
        silent_s = time.monotonic() - self._worked_s
        return self._worked_s == 0.0 or silent_s < self._link.options.timeout_s

    def is_stuck(self) -> bool:
        """Whether nothing has been acknowledged for so long that a new client may do better: the
        client repeats requests for ever, even to a partition that no longer exists."""
        silent_s = time.monotonic() - self._worked_s
        return self._producer is not None and silent_s > _PATIENCE * self._link.options.timeout_s

    def send(self, record: Waiting) -> bool:
        """Hand a record to the client. False if its pieces must arrive first.

        Raises:
            KafkaError: the client refuses it.
        """
        producer = self._producer
        assert producer is not None and self._most is not None, "is_open() first"
        if len(record.payload) <= self._most:
            record.future = self._put(producer, "traces", record.payload)
            return True
        if not record.pieces:
            record.pieces = [
                self._put(producer, "parts", piece) for piece in pieces(record.payload, self._most)
            ]
        if not all(piece.is_done for piece in record.pieces):
            return False
        where = encode_reference(record.pieces, len(record.payload))
        record.future = self._put(producer, "traces", where, [PARTS_HEADER])
        return True

    def cut(self) -> None:
        """Close the client without waiting for it."""
        producer, self._producer = self._producer, None
        if producer is not None:
            close_now(producer)

    def pause(self) -> None:
        """Cut the line for a while, a longer one after each failure."""
        self.cut()
        self._link.forget_topics()
        pause_s = min(_LONGEST_PAUSE_S, 0.1 * 2.0 ** min(self._failures, 10))
        self._failures += 1
        self.not_before_s = time.monotonic() + pause_s * _JITTER.uniform(0.5, 1.0)

    def send_less(self) -> bool:
        """The broker takes no message of this size: send half of it from now on. False if it
        already is too little."""
        self.cut()
        if self._most is None or self._most <= _LEAST_PIECE:
            return False
        self._most = max(_LEAST_PIECE, self._most // 2)
        return True

    def _put(
        self,
        producer: KafkaProducer,
        topic: str,
        value: Payload,
        headers: list[tuple[str, bytes]] | None = None,
    ) -> Any:
        return producer.send(
            self._link.topic(topic), value, self._key, headers, partition=self._partition
        )

    def _new_producer(self) -> KafkaProducer:
        options = self._link.options
        for name in ("traces", "parts"):
            self._link.ensure_topic(name, options.partitions, self._retention())
        if self._most is None:
            self._most = self._link.message_limit("traces")
        with kafka_errors(f"{self._link.address.location} cannot be reached"):
            producer = self._link.producer(
                self,
                batch_size=min(options.batch_bytes, self._most),
                compression_type=None if options.compression == "none" else options.compression,
                # Never: it tries until the records are stored, and the queue is bounded by us.
                delivery_timeout_ms=365 * 24 * 3600 * 1000,
            )
            try:
                both = [producer.partitions_for(self._link.topic(n)) for n in ("traces", "parts")]
            except KafkaError:
                close_now(producer)
                raise
        self._partition = self._emptiest(sorted(both[0] & both[1]))
        return producer

    def _emptiest(self, partitions: list[int]) -> int:
        """The partition that has got the fewest messages so far, so that writers spread."""
        topic = self._link.topic("traces")
        with (
            kafka_errors(f"{self._link.address.location} cannot be reached"),
            self._link.admin() as admin,
        ):
            ends = ends_of(admin, [TopicPartition(topic, number) for number in partitions])
        _JITTER.shuffle(partitions)
        return min(partitions, key=lambda number: ends[TopicPartition(topic, number)])

    def _retention(self) -> dict[str, str]:
        return {
            "cleanup.policy": "delete",
            "retention.ms": str(max(1, round(self._limits.ttl_s * 1000))),
            "retention.bytes": str(self._max_bytes),
            "segment.bytes": str(max(1 << 20, self._limits.segment_bytes)),
            "max.message.bytes": str(self._link.options.message_bytes),
        }


class _Eviction:
    """Deletes what is over the limits from the partition that this writer fills.

    Exact for the records of this writer; older ones of others in the same partition go with them.
    Where the broker does not delete records, and for partitions that nobody writes to any more, the
    retention of the topic must do.
    """

    def __init__(self, link: KafkaLink, max_bytes: int, ttl_s: float) -> None:
        self.num_records = self.num_bytes = 0
        """Evicted so far."""
        self._link = link
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._held: deque[tuple[int, int, float, int | None]] = deque()
        """Offset, bytes, monotonic time, and offset of the first piece of each of our records."""
        self._held_bytes = 0
        self._partition: int | None = None
        self._begin: int | None = None
        """Offset of the oldest record in the partition; ``None`` until it is known."""
        self._end = self._end_of_pieces = 0
        """One past the last offset to delete, in both topics."""
        self._deleted = 0
        """``_end`` of the last time it was done."""
        self._not_before_s = 0.0
        self._has_failed = False

    def add(self, partition: int, offset: int, record: Waiting) -> None:
        """One of our records was stored."""
        if partition != self._partition:  # after a failure, the topic may have other partitions
            self._partition, self._begin = partition, None
            self._held.clear()
            self._held_bytes = self._end = self._end_of_pieces = self._deleted = 0
        first = record.pieces[0].value.offset if record.pieces else None
        self._held.append((offset, len(record.payload), record.appended_s, first))
        self._held_bytes += len(record.payload)

    def evict(self) -> None:
        """Delete what is over the limits; a failure is logged, and tried again much later."""
        now_s = time.monotonic()
        if not self._held or now_s < self._not_before_s:
            return
        self._choose(now_s - self._ttl_s)
        if self._end > self._deleted:
            self._delete(now_s)

    def _choose(self, expired_s: float) -> None:
        """Move the ends. A little more goes than must, so that few calls are needed."""
        most = self._max_bytes
        if self._held_bytes > most:
            most -= most // 32
        while self._held and (self._held_bytes > most or self._held[0][2] <= expired_s):
            offset, num_bytes, _, first_piece = self._held.popleft()
            self._held_bytes -= num_bytes
            self.num_bytes += num_bytes
            self._end = offset + 1
            if first_piece is not None:
                self._end_of_pieces = first_piece + 1

    def _delete(self, now_s: float) -> None:
        traces = TopicPartition(self._link.topic("traces"), self._partition)
        parts = TopicPartition(self._link.topic("parts"), self._partition)
        try:
            with self._link.admin() as admin:
                if self._begin is None:
                    self._begin = begin_of(admin, traces)
                admin.delete_records({traces: self._end})
                if self._end_of_pieces:
                    admin.delete_records({parts: self._end_of_pieces})
        except KafkaError as error:
            self._not_before_s = now_s + _EVICT_AGAIN_S
            if not self._has_failed:
                log.warning(
                    "%s deletes no records (%s): only its own retention, if any, bounds the topic",
                    self._link.address.location,
                    reason_of(error),
                )
            self._has_failed = True
            return
        self.num_records += max(0, self._end - max(self._begin, self._deleted))
        self._deleted = self._end


def ends_of(admin: Any, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
    """One past the newest record of each partition."""
    from kafka.admin import OffsetSpec

    found = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))
    return {one: int(found[one].offset) for one in partitions}


def begin_of(admin: Any, partition: TopicPartition) -> int:
    """Offset of the oldest record in a partition."""
    from kafka.admin import OffsetSpec

    found = admin.list_partition_offsets({partition: OffsetSpec.EARLIEST})
    return int(found[partition].offset)


def pieces(payload: Payload, most: int) -> Iterator[Payload]:
    """The record in pieces of at most ``most`` bytes."""
    view = memoryview(payload)
    for start in range(0, len(view), most):
        yield view[start : start + most]


def encode_reference(futures: Sequence[Any], num_bytes: int) -> bytes:
    """Content of the message that stands for a record in pieces."""
    offsets = [future.value.offset for future in futures]
    partition = futures[0].value.partition
    return json.dumps({"partition": partition, "offsets": offsets, "num_bytes": num_bytes}).encode()
