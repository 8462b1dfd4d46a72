"""Writes traces to Redis: batches of records, stored in one transaction each.

A record is acknowledged once the server has confirmed its batch. Until then it waits in memory.
Whether a crash of the server itself may lose it then is the server's setting ``appendfsync``, see
docs/buffer.md.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence

from buffer.counts import WriterCounts
from buffer.interface import Payload, ServiceAwayError, TraceLimits, TraceWriter, check_record
from buffer.redis_batches import (
    Batch,
    batches_key,
    ends_key,
    id_of,
    record_fields,
    records_key,
)
from buffer.redis_client import Command, RedisClient, said_by_server
from buffer.redis_eviction import RedisEvictor
from buffer.spool import Breaker, Spool

DEFAULT_BYTES = 1 << 30
"""What the buffer holds where ``buffer.max_bytes`` leaves it open."""
_BATCH_BYTES = 1 << 20
_BATCH_RECORDS = 256
_BATCHES_PER_LOG = 16  # a batch is at most this part of the log: eviction takes whole batches
_ALREADY_STORED = "equal or smaller"


class RedisWriter(TraceWriter):
    """Appends to a stream of its own."""

    def __init__(self, client: RedisClient, limits: TraceLimits) -> None:
        self._client = client
        self._limits = limits
        self._max_bytes = DEFAULT_BYTES if limits.max_bytes is None else limits.max_bytes
        now_ms = int(time.time() * 1000)
        self._name = f"w{os.getpid()}-{now_ms}-{secrets.token_hex(4)}"
        self._batch_bytes = min(_BATCH_BYTES, max(1, self._max_bytes // _BATCHES_PER_LOG))
        self._spool = Spool(client.options.spool_bytes)
        self._breaker = Breaker()
        self._evictor = RedisEvictor(client, limits, self._max_bytes)
        self._stored = self._stored_bytes = self._doubtful = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def counts(self) -> WriterCounts:
        return WriterCounts(
            appended=self._spool.added,
            durable=self._stored,
            pending=len(self._spool),
            doubtful=self._doubtful,
            evicted_records=self._evictor.num_records,
            evicted_bytes=self._evictor.num_bytes,
            dropped=self._spool.dropped,
            deleted=self._spool.removed,
        )

    def append(self, payload: Payload) -> int:
        """Take one record. If there is no room for it, send what waits or, while the server is
        away, drop the oldest."""
        check_record(len(payload), self._max_bytes)
        if self._spool.is_full(len(payload)) and self._breaker.is_closed:
            with contextlib.suppress(ServiceAwayError):  # ``tend`` says so
                self._send_all()
        return self._spool.add(payload)

    def sync(self) -> range:
        """Send everything that waits, even if the server failed a moment ago."""
        return self._send_all()

    def tend(self) -> range:
        """Send what waits if it is due, and evict. While the server is away, it is tried from time
        to time."""
        newly = range(self._spool.added, self._spool.added)
        self._spool.drop_older(self._limits.ttl_s)
        if not self._breaker.is_closed:
            return newly
        is_due = self._spool.age_s >= self._limits.sync_interval_s
        if len(self._spool) and (is_due or self._spool.num_bytes >= self._batch_bytes):
            newly = self._send_all()
        with self._trying():
            self._evictor.evict_if_due()
        return newly

    def remove(self, is_unwanted: Callable[[Payload], bool]) -> int:
        return self._spool.remove(is_unwanted)

    def close(self) -> None:
        try:
            self._send_all()
        finally:
            self._doubtful += self._spool.forget()
            self._spool.drop_all()
            self._client.close()

    def _send_all(self) -> range:
        first, end = None, self._spool.added
        while self._spool.begin(_BATCH_RECORDS, self._batch_bytes):
            with self._trying():
                self._send_batch()
            numbers = self._spool.done()
            first, end = numbers.start if first is None else first, numbers.stop
        return range(end if first is None else first, end)

    def _send_batch(self) -> None:
        payloads = self._spool.batch
        num_bytes = sum(map(len, payloads))
        self._evictor.make_room(num_bytes)
        batch = Batch(
            first=self._stored,
            end=self._stored + len(payloads),
            num_bytes=num_bytes,
            bytes_before=self._stored_bytes,
            unix_ms=int(time.time() * 1000),
        )
        answers = self._client.together(self._commands(batch, payloads))
        self._check(answers)
        self._stored += len(payloads)
        self._stored_bytes += num_bytes

    def _commands(self, batch: Batch, payloads: Sequence[Payload]) -> Iterable[Command]:
        options = self._client.options
        key = records_key(options, self._name)
        for number, payload in enumerate(payloads, start=batch.first):
            fields = record_fields(payload, options.piece_bytes)
            yield "XADD", key, id_of(number), *fields
        last = id_of(batch.end - 1)
        yield "XADD", batches_key(options, self._name), last, *batch.fields()
        yield "HSET", ends_key(options), self._name, batch.end

    def _check(self, answers: Sequence[object]) -> None:
        """Raises unless every record is stored, now or by an attempt whose answer was lost."""
        for answer in answers:
            if isinstance(answer, Exception) and _ALREADY_STORED not in str(answer):
                raise self._client.away(said_by_server(answer))

    def _trying(self) -> _Trying:
        return _Trying(self._breaker)


class _Trying:
    """Tells the breaker how it went."""

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._breaker.worked()
        else:
            self._breaker.failed()
