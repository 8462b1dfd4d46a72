"""A buffer in Redis or Valkey, ``redis://host:port/db`` or ``rediss://...``.

Traces are streams, one for each server; see ``redis_batches.py`` for the keys, and docs/buffer.md
for what is guaranteed and what the server's configuration adds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from buffer.counts import BufferStats
from buffer.deletions import Deleted, Deletions, now_ms
from buffer.interface import (
    MAX_UNREADABLE_BYTES,
    Backend,
    Location,
    Offsets,
    Payload,
    Report,
    ServiceAwayError,
    TraceLimits,
    Unreadable,
)
from buffer.redis_client import RedisClient
from buffer.redis_deletion import delete_from_redis, read_deletions, undelete_in_redis
from buffer.redis_eviction import RedisEvictor
from buffer.redis_fetch import records_at
from buffer.redis_member import RedisMember
from buffer.redis_reader import RedisReader
from buffer.redis_stats import read_stats
from buffer.redis_url import parse_redis_url
from buffer.redis_weights import RedisWeights
from buffer.redis_writer import DEFAULT_BYTES, RedisWriter

_MAX_UNREADABLE = 1024  # records kept for inspection, whatever their size


class RedisBuffer(Backend):
    """Traces and weights of one run on one server or cluster."""

    def __init__(self, url: str, run_dir: Path) -> None:
        self._options = parse_redis_url(url, run_dir)
        self._kept = RedisClient(self._options)
        """For what is asked again and again."""
        self._evictor: RedisEvictor | None = None

    @property
    def spool_bytes(self) -> int:
        return self._options.spool_bytes

    @property
    def run(self) -> str:
        return self._options.run

    def open_trace_writer(self, limits: TraceLimits) -> RedisWriter:
        return RedisWriter(self._client(), limits)

    def open_record_reader(
        self, offsets: Offsets | None = None, group: str | None = None
    ) -> RedisReader | RedisMember:
        if group is None:
            return RedisReader(self._client(), offsets)
        return RedisMember(self._client(), group, offsets)

    def fetch(self, locations: Collection[Location]) -> dict[Location, Payload]:
        client = self._client()
        try:
            return records_at(client, locations)
        finally:
            client.close()

    def keep_unreadable(self, name: str, payload: Payload) -> None:
        client = self._client()
        key = self._options.key("unreadable")
        with contextlib.suppress(ServiceAwayError):
            kept = client.call("HGETALL", f"{key}:sizes")
            used = sum(map(int, kept.values()))
            if used + len(payload) <= MAX_UNREADABLE_BYTES and len(kept) < _MAX_UNREADABLE:
                client.together(
                    [
                        ("HSET", key, name, memoryview(payload)),
                        ("HSET", f"{key}:sizes", name, len(payload)),
                        ("ZADD", f"{key}:times", now_ms(), name),
                    ]
                )
        client.close()

    def unreadable(self) -> list[Unreadable]:
        client = self._client()
        try:
            kept = client.call("HGETALL", f"{self._options.key('unreadable')}:sizes")
        finally:
            client.close()
        return [Unreadable(name.decode(), int(size)) for name, size in sorted(kept.items())]

    def open_weights(self, line: str = "") -> RedisWeights:
        run = f"{self._options.run}.{line}" if line else self._options.run
        return RedisWeights(RedisClient(replace(self._options, run=run)))

    def delete(self, tenant: str, *, until_ms: int | None = None) -> Deleted:
        client = self._client()
        try:
            return delete_from_redis(client, tenant, until_ms)
        finally:
            client.close()

    def undelete(self, digest: str) -> bool:
        return undelete_in_redis(self._kept, digest)

    def deletions(self) -> Deletions:
        return read_deletions(self._kept)

    def expire(self, limits: TraceLimits) -> None:
        if self._evictor is None:
            most = DEFAULT_BYTES if limits.max_bytes is None else limits.max_bytes
            self._evictor = RedisEvictor(self._kept, limits, most)
        self._evictor.evict_if_due()

    def stats(self) -> BufferStats:
        client = self._client()
        try:
            return read_stats(client)
        finally:
            client.close()

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        stats = self.stats()
        max_bytes = DEFAULT_BYTES if limits.max_bytes is None else limits.max_bytes
        where = self._options.location
        yield RedisReport(where, stats.num_writers, stats.held, stats.held_bytes, max_bytes)

    def _client(self) -> RedisClient:
        return RedisClient(self._options)


@dataclass(frozen=True, slots=True)
class RedisReport(Report):
    """How much is stored."""

    where: str
    num_writers: int
    records: int
    num_bytes: int
    max_bytes: int

    @property
    def is_damaged(self) -> bool:
        return False

    def to_line(self) -> str:
        return (
            f"{self.where}: {self.records} records, {self.num_bytes} bytes of "
            f"{self.num_writers} writers; holds up to {self.max_bytes} bytes"
        )

    def to_json(self) -> dict[str, Any]:
        return {"kind": "redis", **asdict(self)}
