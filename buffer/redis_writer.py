"""Writes traces to Redis: batches of records, stored in one transaction each.

A record is acknowledged once the server has confirmed its batch. Until then it waits in memory.
Whether a crash of the server itself may lose it then is the server's setting ``appendfsync``, see
docs/buffer.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from buffer.interface import Payload, TraceLimits
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
from buffer.spool import Breaker
from buffer.spooled_writer import SpooledWriter

DEFAULT_BYTES = 1 << 30
"""What the buffer holds where ``buffer.max_bytes`` leaves it open."""
_BATCH_BYTES = 1 << 20
_BATCHES_PER_LOG = 16  # a batch is at most this part of the log: eviction takes whole batches
_ALREADY_STORED = "equal or smaller"


class RedisWriter(SpooledWriter):
    """Appends to a stream of its own."""

    def __init__(self, client: RedisClient, limits: TraceLimits) -> None:
        max_bytes = DEFAULT_BYTES if limits.max_bytes is None else limits.max_bytes
        super().__init__(
            limits,
            max_bytes=max_bytes,
            spool_bytes=client.options.spool_bytes,
            batch_bytes=min(_BATCH_BYTES, max(1, max_bytes // _BATCHES_PER_LOG)),
        )
        self._client = client
        self._evictor = RedisEvictor(client, limits, max_bytes)
        self._stored_bytes = 0

    @property
    def _evicted(self) -> tuple[int, int]:
        return self._evictor.num_records, self._evictor.num_bytes

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

    def _hang_up(self) -> None:
        self._client.close()

    def _send_batch(self) -> None:
        with self._trying():
            self._store(self._spool.batch)

    def _store(self, payloads: Sequence[Payload]) -> None:
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
