"""Eviction of old traces from Redis: whole batches, oldest first, by age and by bytes.

Any writer evicts for all. Two that evict at once delete the same batches, and each counts what it
deleted itself: the server says how many records that were.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from buffer.interface import TraceLimits
from buffer.redis_batches import Batch, batches_key, ends_key, id_of, records_key, removed_key
from buffer.redis_client import RedisClient

_LOOK_S = 1.0
"""Longest time between two looks at what other writers have stored; at a high rate they may exceed
the limit by what they store in that time."""
_LOOKS_PER_TTL = 8
_SLACK = 16  # evict to this part below the limit, so that not every batch must evict
_BATCHES_AT_ONCE = 64


class RedisEvictor:
    """Evicts on behalf of one writer."""

    def __init__(self, client: RedisClient, limits: TraceLimits, max_bytes: int) -> None:
        self._client = client
        self._ttl_s = limits.ttl_s
        self._max_bytes = max_bytes
        self._held_bytes = 0
        """Held when it last looked, and stored by this writer since."""
        self._next_look_s = 0.0
        self.num_records = 0
        """Records it has evicted."""
        self.num_bytes = 0

    def make_room(self, num_bytes: int) -> None:
        """Before this writer stores so many more bytes."""
        if self._held_bytes + num_bytes > self._max_bytes or self._is_due:
            self._evict(num_bytes)
        self._held_bytes += num_bytes

    def evict_if_due(self) -> None:
        """Evict what has grown too old, and too much, from time to time."""
        if self._is_due:
            self._evict(0)

    @property
    def _is_due(self) -> bool:
        return time.monotonic() >= self._next_look_s

    def _evict(self, need_bytes: int) -> None:
        self._next_look_s = time.monotonic() + min(_LOOK_S, self._ttl_s / _LOOKS_PER_TTL)
        held = held_by_writer(self._client)
        self._held_bytes = sum(
            last.bytes_before + last.num_bytes - first.bytes_before for first, last in held.values()
        )
        over = self._held_bytes + need_bytes > self._max_bytes
        target = self._max_bytes - (self._max_bytes // _SLACK if over else 0)
        expired_ms = (time.time() - self._ttl_s) * 1000
        for writer, batch in self._oldest_first(list(held)):
            too_much = self._held_bytes + need_bytes > target
            if batch.unix_ms > expired_ms and not too_much:
                break
            self._delete(writer, batch)
            self._held_bytes -= batch.num_bytes
        times = self._client.options.key("unreadable", "times")
        aside = self._client.call("ZRANGEBYSCORE", times, "-inf", int(expired_ms))
        if aside:
            forget_unreadable(self._client, aside)

    def _oldest_first(self, writers: list[str]) -> Iterator[tuple[str, Batch]]:
        """All batches, by age; those of a writer in order, whatever its clock did."""
        streams = {writer: _batches(self._client, writer) for writer in writers}
        heads = {writer: next(stream, None) for writer, stream in streams.items()}
        while heads:
            found = [(batch.unix_ms, writer) for writer, batch in heads.items() if batch]
            if not found:
                return
            _, writer = min(found)
            batch = heads[writer]
            assert batch is not None
            yield writer, batch
            heads[writer] = next(streams[writer], None)

    def _delete(self, writer: str, batch: Batch) -> None:
        options = self._client.options
        from_here = ("MINID", "=", id_of(batch.end))
        deleted, *_ = self._client.at_once(
            [
                ("XTRIM", records_key(options, writer), *from_here),
                ("XTRIM", batches_key(options, writer), *from_here),
                ("ZREMRANGEBYSCORE", removed_key(options, writer), "-inf", batch.end - 1),
            ]
        )
        if deleted:
            self.num_records += deleted
            self.num_bytes += batch.num_bytes


def forget_unreadable(client: RedisClient, names: list[bytes]) -> None:
    """Remove records that were put aside.

    Raises:
        ServiceAwayError: the server does not answer.
    """
    key = client.options.key("unreadable")
    client.together(
        [
            ("HDEL", key, *names),
            ("HDEL", f"{key}:sizes", *names),
            ("ZREM", f"{key}:times", *names),
        ]
    )


def held_by_writer(client: RedisClient) -> dict[str, tuple[Batch, Batch]]:
    """Oldest and newest batch of every writer that has any."""
    options = client.options
    writers = [name.decode() for name in client.call("HKEYS", ends_key(options))]
    keys = [batches_key(options, writer) for writer in writers]
    found = client.at_once(
        itertools.chain.from_iterable(
            (("XRANGE", key, "-", "+", "COUNT", 1), ("XREVRANGE", key, "+", "-", "COUNT", 1))
            for key in keys
        )
    )
    pairs = zip(writers, found[::2], found[1::2], strict=True)
    return {
        writer: (Batch.of(oldest[0]), Batch.of(newest[0]))
        for writer, oldest, newest in pairs
        if oldest and newest
    }


def _batches(client: RedisClient, writer: str) -> Iterator[Batch]:
    """Batches of a writer, oldest first."""
    key, start = batches_key(client.options, writer), "-"
    while entries := client.call("XRANGE", key, start, "+", "COUNT", _BATCHES_AT_ONCE):
        batches = [Batch.of(entry) for entry in entries]
        yield from batches
        start = id_of(batches[-1].end)
