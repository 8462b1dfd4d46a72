"""Commands of one group of readers in Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buffer.interface import ServiceAwayError
from buffer.redis_batches import (
    Entry,
    committed_field,
    deleted_key,
    id_of,
    number_of,
    records_key,
    removed_key,
)
from buffer.redis_claims import RedisClaims
from buffer.redis_client import RedisClient

CREATE = """
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if made.err then return made end
redis.call('HSET', KEYS[3], ARGV[2], redis.call('ZCARD', KEYS[2]))
return made
"""
"""Makes a group. What was deleted before counts as deleted for it, too. KEYS: stream, set of
deleted numbers, hash of counts. ARGV: group, field of the hash."""


@dataclass(frozen=True, slots=True)
class Handed:
    """Answer to a request for new records of one writer."""

    entries: list[Entry]
    before: int
    """One past the number of the last record that the group had been handed before."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A record that a consumer has and has not committed."""

    number: int
    idle_ms: int
    """Since it was handed out."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """What the server knows of one consumer of one writer's stream."""

    writer: str
    name: str
    num_pending: int
    idle_ms: int
    """Since it last did anything."""


class RedisGroup:
    """The consumer groups of one name, one on each writer's stream."""

    def __init__(self, client: RedisClient, name: str) -> None:
        self.name = name
        self._client = client
        self._options = client.options
        self.claims = RedisClaims(client, name)

    def take_new(
        self, consumer: str, writers: Sequence[str], count: int
    ) -> dict[str, Handed | None]:
        """Hand the next records of these writers to a consumer, at most ``count`` of each.

        Returns:
            By writer; ``None`` where there was no group yet: there is one now.
        """
        reads = ("XREADGROUP", "GROUP", self.name, consumer, "COUNT", count, "STREAMS")
        answers = self._client.together(
            command
            for writer in writers
            for command in (("XINFO GROUPS", self._key(writer)), (*reads, self._key(writer), ">"))
        )
        pairs = zip(writers, answers[::2], answers[1::2], strict=True)
        return {writer: self._handed(writer, groups, found) for writer, groups, found in pairs}

    def _handed(self, writer: str, groups: Any, found: Any) -> Handed | None:
        ours = [] if isinstance(groups, Exception) else [*filter(self._is_ours, groups)]
        if not ours or isinstance(found, Exception):
            self._create(writer)
            return None
        return Handed(found[0][1] if found else [], number_of(ours[0]["last-delivered-id"]) + 1)

    def _is_ours(self, group: Mapping[str, Any]) -> bool:
        return bool(group["name"] == self.name.encode())

    def _create(self, writer: str) -> None:
        """Make the group on a writer's stream, before its first record."""
        options, field = self._options, committed_field(self.name, writer)
        keys = self._key(writer), removed_key(options, writer), deleted_key(options)
        try:
            self._client.call("EVAL", CREATE, len(keys), *keys, self.name, field)
        except ServiceAwayError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def consumers(self, writers: Sequence[str]) -> list[Consumer]:
        """Consumers of these writers' streams, where the group exists."""
        answers = self._client.together(
            ("XINFO CONSUMERS", self._key(writer), self.name) for writer in writers
        )
        return [
            Consumer(writer, found["name"].decode(), found["pending"], found["idle"])
            for writer, answer in zip(writers, answers, strict=True)
            if not isinstance(answer, Exception)
            for found in answer
        ]

    def pending(self, writer: str, consumer: str, first: int, count: int) -> list[Pending]:
        """What a consumer has, from record ``first`` on, ascending."""
        found = self._client.call(
            *("XPENDING", self._key(writer), self.name, id_of(first), "+", count, consumer),
            parse_detail=True,
        )
        return [Pending(number_of(one["message_id"]), one["time_since_delivered"]) for one in found]

    def claim(
        self, writer: str, consumer: str, numbers: Sequence[int], min_idle_ms: int
    ) -> list[Entry]:
        """Give records to a consumer, if they were not handed out in the last ``min_idle_ms``.

        Returns:
            Those it got; evicted ones are nobody's any more.
        """
        ids = map(id_of, numbers)
        key = self._key(writer)
        found = self._client.call("XCLAIM", key, self.name, consumer, min_idle_ms, *ids)
        return [entry for entry in found if entry[1]]  # before Redis 7: None for evicted ones

    def is_pending(self, writer: str, number: int) -> bool:
        """Whether a member has this record and has not committed it, even if it was evicted."""
        at = id_of(number)
        return bool(
            self._client.call(
                *("XPENDING", self._key(writer), self.name, at, at, 1), parse_detail=True
            )
        )

    def remove(self, consumer: Consumer) -> None:
        """Forget a consumer that has nothing."""
        key = self._key(consumer.writer)
        self._client.call("XGROUP", "DELCONSUMER", key, self.name, consumer.name)

    def _key(self, writer: str) -> str:
        return records_key(self._options, writer)
