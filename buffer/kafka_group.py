"""Membership of a trace reader in a group, and who gets which partition.

Kafka's own ways to share partitions take them from a member at any time, and what it had read and
not committed is read again by another, although it is alive. Here a partition stays with a member
until that has committed all it had read from it: members tell what they hold when they join, and
whoever shares out tells them what they should release, which they then read no more.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.admin import MemberToRemove
from kafka.coordinator.assignors.abstract import (
    AbstractPartitionAssignor,
    ConsumerProtocolAssignment,
    ConsumerProtocolSubscription,
)
from kafka.errors import KafkaError, KafkaTimeoutError
from kafka.structs import MemberState

from buffer.interface import Offsets
from buffer.kafka_fetch import held_ends
from buffer.kafka_link import KafkaLink
from buffer.small_json import is_whole, parse_small_json

_HEARTBEAT_MS = 500
_JOIN_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """How far one partition was read."""

    next: int = 0
    """Offset of the next record."""
    lost: int = 0
    """Records before it that nobody can have read: evicted or damaged."""
    deleted: int = 0
    """Records before it that were passed over, because they were deleted with their tenant."""

    def to_commit(self) -> OffsetAndMetadata:
        """As Kafka stores it for a group."""
        metadata = json.dumps({"lost": self.lost, "deleted": self.deleted})
        return OffsetAndMetadata(self.next, metadata, -1)

    @classmethod
    def from_commit(cls, committed: OffsetAndMetadata | None) -> Place:
        """Inverse of ``to_commit``; a broker that drops metadata has forgotten what was lost."""
        if committed is None:
            return cls()
        lost = deleted = 0
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            stored = parse_small_json(committed.metadata.encode())
            found = stored["lost"], stored.get("deleted", 0)  # older readers did not store it
            if all(map(is_whole, found)):
                lost, deleted = found
        return cls(committed.offset, lost, deleted)

    def to_json(self) -> list[int]:
        return [self.next, self.lost, self.deleted]

    @classmethod
    def from_json(cls, partition: str, stored: Any) -> Place:
        """Inverse of ``to_json``.

        Raises:
            ValueError: it is no such thing.
        """
        match stored:
            case [int(next_), int(lost), *rest] if partition.isdecimal() and len(rest) < 2:
                deleted = rest[0] if rest else 0  # older checkpoints lack it
                if type(deleted) is int and min(next_, lost, deleted) >= 0:
                    return cls(next_, lost, deleted)
        raise ValueError(
            f"offsets of {partition!r} must be a partition's number, with the offset of the next "
            f"record and how many were lost, got {stored!r}"
        )


def places_of(offsets: Offsets | None) -> dict[int, Place]:
    """Places by partition.

    Raises:
        ValueError: ``offsets`` hold something else.
    """
    stored = {name: value for name, value in (offsets or {}).items() if name != "member"}
    places = {name: Place.from_json(name, value) for name, value in stored.items()}
    return {int(name): place for name, place in places.items()}


class Membership:
    """What a reader has to do with its group."""

    def __init__(self, link: KafkaLink, group: str, predecessor: dict[str, Any]) -> None:
        """
        Args:
            predecessor: offsets of a member that we succeed; empty if there is none.
        """
        self.predecessor = predecessor
        """Until we have succeeded it."""
        self.member: str | None = None
        """Our name in the group, once we are a member."""
        self._link = link
        self._group = link.group(group)
        self._committed: dict[int, int] = {}
        """Offset up to which the group has committed our partitions."""
        self._held: set[int] = set()
        """Partitions of which we have read more than was committed."""
        self._sharing = _HeldStay(lambda: self._held)
        self._settled: tuple[Any, ...] | None = None
        """Generation and partitions that the reader knows of."""
        self._joined_again_s = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the consumer."""
        session_ms = round(self._link.options.session_s * 1000)
        return {
            "group_id": self._group,
            "session_timeout_ms": session_ms,
            "heartbeat_interval_ms": min(_HEARTBEAT_MS, session_ms // 3),
            "max_poll_interval_ms": max(60_000, session_ms),
            "partition_assignment_strategy": [self._sharing],
        }

    @property
    def released(self) -> Collection[int]:
        """Partitions of ours that we should read no more."""
        return self._sharing.released

    def join(self, consumer: KafkaConsumer, topic: str) -> bool:
        """Be a member, and succeed the predecessor. True if the partitions may have changed.

        Raises:
            KafkaError: the group does not settle.
        """
        if not consumer.subscription():
            self._remove_predecessor()
            consumer.subscribe([topic])
        options = self._link.options
        deadline_s = time.monotonic() + options.timeout_s + options.session_s
        while consumer.group_metadata().state != MemberState.STABLE:
            if time.monotonic() > deadline_s:
                raise KafkaTimeoutError(f"group {self._group} does not settle")
            consumer.poll(timeout_ms=100, max_records=1)
        about = consumer.group_metadata()
        settled = (about.generation_id, about.member_id, frozenset(consumer.assignment()))
        if settled == self._settled:
            return False
        if self.predecessor:
            self.commit(consumer, self._within(consumer, places_of(self.predecessor)))
            self.predecessor = {}
        self._settled, self.member = settled, about.member_id
        return True

    def committed(self, consumer: KafkaConsumer, numbers: Iterable[int]) -> dict[int, Place]:
        """Where the group is in partitions that are ours now.

        Raises:
            KafkaError: the brokers do not answer.
        """
        places = {number: self._stored(consumer, number) for number in numbers}
        self._committed = {number: place.next for number, place in places.items()}
        return places

    def commit(self, consumer: KafkaConsumer, places: Mapping[int, Place]) -> None:
        """Commit places unless the group is further already, in other members' partitions too.

        Raises:
            KafkaError: it did not work.
        """
        wanted = {}
        for number, place in places.items():
            known = self._committed.get(number)
            if known is None:
                known = self._stored(consumer, number).next
            if place.next > known:
                wanted[number] = place
        if wanted:
            stored = {self._partition(number): one.to_commit() for number, one in wanted.items()}
            consumer.commit(stored, timeout_ms=self._link.timeout_ms)
        for number in self._committed.keys() & wanted.keys():
            self._committed[number] = wanted[number].next

    def note(self, consumer: KafkaConsumer, places: Mapping[int, Place]) -> None:
        """Take note of what was read and committed, and give up what we should if we can."""
        self._held = {
            number
            for number, place in places.items()
            if place.next > self._committed.get(number, 0)
        }
        now_s = time.monotonic()
        can_release = set(self.released) - self._held
        if can_release and now_s - self._joined_again_s > _JOIN_AGAIN_S:
            self._joined_again_s = now_s
            consumer._coordinator.request_rejoin()

    def begins_anew(self, number: int) -> None:
        """The brokers have forgotten a partition: what was committed may be ahead of what is."""
        self._committed[number] = 0

    def _within(self, consumer: KafkaConsumer, places: Mapping[int, Place]) -> dict[int, Place]:
        """Those that are not beyond what the partitions hold. Others are from before the brokers
        forgot them: committed, they would hide as many new records from the group."""
        topic = self._link.topic("traces")
        there = consumer.partitions_for_topic(topic) or ()
        partitions = [self._partition(number) for number in places if number in there]
        ends = consumer.end_offsets(partitions) if partitions else {}
        if any(places[one.partition].next > end for one, end in ends.items()):
            ends = held_ends(self._link, consumer.beginning_offsets(partitions), ends)
        known = {one.partition: end for one, end in ends.items()}
        return {n: place for n, place in places.items() if n in known and place.next <= known[n]}

    def _partition(self, number: int) -> TopicPartition:
        return TopicPartition(self._link.topic("traces"), number)

    def _stored(self, consumer: KafkaConsumer, number: int) -> Place:
        partition = self._partition(number)
        return Place.from_commit(
            consumer.committed(partition, metadata=True, timeout_ms=self._link.timeout_ms)
        )

    def _remove_predecessor(self) -> None:
        """Tell the group that it is gone, so that nobody waits for its session to end."""
        member = self.predecessor.get("member")
        if isinstance(member, str):
            with contextlib.suppress(KafkaError), self._link.admin() as admin:
                admin.remove_group_members(self._group, [MemberToRemove(member_id=member)])


class _HeldStay(AbstractPartitionAssignor):  # type: ignore[misc]  # the client has no types
    """Shares out partitions; those that are held stay, and are released if they are too many."""

    name = "slipstream-held-stay"

    def __init__(self, held: Callable[[], Collection[int]]) -> None:
        """
        Args:
            held: the partitions that this member holds.
        """
        self.released: frozenset[int] = frozenset()
        """What the last sharing told this member to give up."""
        self._held = held

    def metadata(self, topics: Collection[str]) -> ConsumerProtocolSubscription:
        held = json.dumps(sorted(self._held())).encode()
        return ConsumerProtocolSubscription(0, list(topics), held)

    def assign(self, cluster: Any, members: Any) -> dict[str, ConsumerProtocolAssignment]:
        topic = members[0].metadata.topics[0]
        partitions = sorted(cluster.partitions_for_topic(topic) or ())
        held = {one.member_id: _numbers(one.metadata.user_data) for one in members}
        shares, released = share_out(partitions, held)
        return {
            member: ConsumerProtocolAssignment(
                0, [(topic, sorted(share))], json.dumps(sorted(released[member])).encode()
            )
            for member, share in shares.items()
        }

    def on_assignment(self, assignment: ConsumerProtocolAssignment, generation: int) -> None:
        self.released = frozenset(_numbers(assignment.user_data))


def share_out(
    partitions: Collection[int], held: Mapping[str, Collection[int]]
) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Share partitions among members.

    Args:
        partitions: all of them.
        held: member -> partitions that must stay with it for now. If two claim one, as after a
            member was cut off, the first in the order of names keeps it.

    Returns:
        Partitions of each member, and those among them that it should release.
    """
    shares: dict[str, set[int]] = {member: set() for member in sorted(held)}
    free = set(partitions)
    for member, share in shares.items():
        share |= free.intersection(held[member])
        free -= share
    most = -(-len(partitions) // len(held))
    released = {member: set(sorted(share)[most:]) for member, share in shares.items()}
    for partition in sorted(free):
        poorest = min(shares, key=lambda member: len(shares[member]))
        shares[poorest].add(partition)
    return shares, released


def _numbers(content: bytes | None) -> list[int]:
    """Partitions as ``json.dumps`` wrote them; none if it is something else."""
    with contextlib.suppress(ValueError, TypeError):
        return [number for number in parse_small_json(content or b"[]") if is_whole(number)]
    return []
