"""Counts what a buffer in Redis holds and what each group has done with it, all of one moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buffer.counts import BufferStats, GroupCounts
from buffer.redis_batches import (
    Batch,
    batches_key,
    committed_field,
    committed_key,
    ends_key,
    number_of,
    records_key,
)
from buffer.redis_client import RedisClient


def read_stats(client: RedisClient) -> BufferStats:
    """Count everything in one transaction.

    Raises:
        ServiceAwayError: the server does not answer.
    """
    options = client.options
    writers = [name.decode() for name in client.call("HKEYS", ends_key(options))]
    commands: list[tuple[Any, ...]] = [
        ("HGETALL", ends_key(options)),
        ("HGETALL", committed_key(options)),
    ]
    for writer in writers:
        batches = batches_key(options, writer)
        commands += [
            ("XINFO GROUPS", records_key(options, writer)),
            ("XRANGE", batches, "-", "+", "COUNT", 1),
            ("XREVRANGE", batches, "+", "-", "COUNT", 1),
        ]
    found_ends, committed, *rest = client.together(commands)
    held = held_bytes = 0
    ends = {writer: int(found_ends.get(writer.encode(), 0)) for writer in writers}
    groups_of = [_groups(groups) for groups in rest[::3]]
    totals: dict[str, list[int]] = {name: [0, 0, 0] for groups in groups_of for name in groups}
    for writer, groups, oldest, newest in zip(
        writers, groups_of, rest[1::3], rest[2::3], strict=True
    ):
        end = first = ends[writer]
        if oldest and newest:
            first_batch, last_batch = Batch.of(oldest[0]), Batch.of(newest[0])
            first = first_batch.first
            held_bytes += last_batch.bytes_before + last_batch.num_bytes - first_batch.bytes_before
        held += end - first
        for name, total in totals.items():
            done = int(committed.get(committed_field(name, writer).encode(), 0))
            counts = _counts_of(groups.get(name, _NOTHING_READ), done, first, end)
            for i, count in enumerate(counts):
                total[i] += count
    return BufferStats(
        num_writers=len(writers),
        appended=sum(ends.values()),
        held=held,
        held_bytes=held_bytes,
        groups=tuple(GroupCounts(name, *total) for name, total in sorted(totals.items())),
    )


_NOTHING_READ = {"last-delivered-id": b"0-0", "pending": 0}
"""A group that has not met a writer yet."""


def _groups(groups: Any) -> dict[str, Mapping[str, Any]]:
    """Groups of one stream; none if there is no stream."""
    if isinstance(groups, Exception):
        return {}
    return {group["name"].decode(): group for group in groups}


def _counts_of(
    group: Mapping[str, Any], committed: int, first: int, end: int
) -> tuple[int, int, int]:
    """Committed, pending and lost records of one writer.

    What was handed out is committed, in somebody's hands, or was evicted before and passed over.

    Args:
        first: number of the oldest record that was not evicted.
        end: one past the number of the newest.
    """
    passed = number_of(group["last-delivered-id"]) + 1
    in_hand = group["pending"]
    reached = max(passed, first)
    return committed, in_hand + end - reached, reached - committed - in_hand
