"""Counts what a buffer in Redis holds and what each group has done with it, all of one moment."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buffer.counts import BufferStats, GroupCounts
from buffer.redis_batches import (
    Batch,
    batches_key,
    committed_field,
    committed_key,
    deleted_key,
    ends_key,
    number_of,
    numbers_of,
    records_key,
    removed_key,
)
from buffer.redis_client import RedisClient


def read_stats(client: RedisClient) -> BufferStats:
    """Count everything in one transaction.

    Raises:
        ServiceAwayError: the server does not answer.
        ValueError: somebody else has stored something under our keys.
    """
    options = client.options
    writers = [name.decode() for name in client.call("HKEYS", ends_key(options))]
    commands: list[tuple[Any, ...]] = [
        ("HGETALL", ends_key(options)),
        ("HGETALL", committed_key(options)),
        ("HGETALL", deleted_key(options)),
    ]
    for writer in writers:
        batches = batches_key(options, writer)
        commands += [
            ("XINFO GROUPS", records_key(options, writer)),
            ("XRANGE", batches, "-", "+", "COUNT", 1),
            ("XREVRANGE", batches, "+", "-", "COUNT", 1),
            ("ZRANGE", removed_key(options, writer), 0, -1),
        ]
    found = client.together(commands)
    found_ends, committed, deleted = (
        numbers_of(values, key) for (_, key), values in zip(commands[:3], found[:3], strict=True)
    )
    rest = found[3:]
    held = held_bytes = num_removed = 0
    ends = {writer: found_ends.get(writer, 0) for writer in writers}
    groups_of = [_groups(groups) for groups in rest[::4]]
    totals: dict[str, list[int]] = {name: [0] * 4 for groups in groups_of for name in groups}
    for writer, groups, oldest, newest, numbers in zip(
        writers, groups_of, rest[1::4], rest[2::4], rest[3::4], strict=True
    ):
        removed = sorted(map(int, numbers))
        end = first = ends[writer]
        if oldest and newest:
            first_batch, last_batch = Batch.of(oldest[0]), Batch.of(newest[0])
            first = first_batch.first
            held_bytes += last_batch.bytes_before + last_batch.num_bytes - first_batch.bytes_before
        held += end - first - _from(removed, first)
        num_removed += len(removed)
        for name, total in totals.items():
            field = committed_field(name, writer)
            done = committed.get(field, 0)
            # A group that has not met the writer gets what was deleted when it is made.
            gone = deleted.get(field, 0) if name in groups else len(removed)
            group = groups.get(name, _NOTHING_READ)
            counts = _counts_of(group, done, gone, _Stream(first, end, removed))
            for i, count in enumerate(counts):
                total[i] += count
    return BufferStats(
        num_writers=len(writers),
        appended=sum(ends.values()),
        held=held,
        held_bytes=held_bytes,
        groups=tuple(GroupCounts(name, *total) for name, total in sorted(totals.items())),
        deleted=num_removed,
    )


_NOTHING_READ = {"last-delivered-id": b"0-0", "pending": 0}
"""A group that has not met a writer yet."""


def _groups(groups: Any) -> dict[str, Mapping[str, Any]]:
    """Groups of one stream; none if there is no stream."""
    if isinstance(groups, Exception):
        return {}
    return {group["name"].decode(): group for group in groups}


@dataclass(frozen=True, slots=True)
class _Stream:
    """Records of one writer."""

    first: int
    """Number of the oldest record that was not evicted."""
    end: int
    """One past the number of the newest."""
    removed: Sequence[int]
    """Numbers of those that were deleted, ascending."""


def _from(numbers: Sequence[int], first: int) -> int:
    """How many of these ascending numbers are at least ``first``."""
    return len(numbers) - bisect.bisect_left(numbers, first)


def _counts_of(
    group: Mapping[str, Any], committed: int, deleted: int, stream: _Stream
) -> tuple[int, int, int, int]:
    """Committed, pending, lost and deleted records of one writer.

    What was handed out is committed, in somebody's hands, or was evicted or deleted before and
    passed over.

    Args:
        deleted: as counted for the group, whether it has passed them or not.
    """
    passed = number_of(group["last-delivered-id"]) + 1
    in_hand = group["pending"]
    reached = max(passed, stream.first)
    ahead = _from(stream.removed, reached)
    pending = in_hand + stream.end - reached - ahead
    return committed, pending, reached - committed - in_hand - (deleted - ahead), deleted
