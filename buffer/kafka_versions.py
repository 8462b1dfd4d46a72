"""What the weights store keeps on Kafka: a log of what happened, and the content of the versions.

``PREFIX.weights`` has one partition. Everything that changes the store is one message there, and
everybody who reads the log from its start comes to the same state, because each message is judged
by those before it alone:

    publish     a version; valid if it is higher than all before and nobody has taken over since the
                epoch that it names. Of several that publish one version, the first in the log wins
    take_over   an epoch; valid if it is higher than all before
    denied      the versions that were rolled back
    use         the versions that a server uses; an empty list ends its mark
    prune       versions to remove; those that are in use at this point of the log stay
    state       all of the above as it was at an earlier offset, so that what lies before may go

This is why the store needs no transactions: whoever publishes appends, and reads back whether its
message was valid. A trainer that was cut off for an hour may append whenever it likes; its epoch is
old by then, for every reader alike. A transactional producer would fence it too, but it compares no
versions, and readers would depend on how well a broker hides aborted transactions. Compaction would
break the log, for it may keep the loser of two messages; so old messages are deleted from the front
instead, behind a ``state``.

``PREFIX.files`` has one partition and is compacted. Files of a version are written there first, in
pieces under keys that no other publication uses; the ``publish`` message says at which offsets. A
version is therefore visible whole or not at all, and pruning it writes tombstones over its pieces.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from buffer.kafka_fetch import fetch_at, wait_until_shown
from buffer.kafka_link import KafkaLink, close_consumer
from buffer.kafka_sender import Sender
from buffer.sealed import Content, Sealed, plain
from buffer.small_json import parse_small_json

log = logging.getLogger(__name__)

IN_USE_STALE_MS = 24 * 3600 * 1000
"""Milliseconds after which a mark that was not renewed is assumed to be a dead server's."""
PIECE_BYTES = 256 << 10
"""Files are stored in pieces of this size, so that reading one takes little memory."""

_OWNERS = 64  # remembered, so that one who was taken over at once learns its own epoch
_SHORTEN_AT = 1000  # messages in the log at which pruning also shortens it
_AT_ONCE = 16  # pieces on their way
_WATCH_MS = 500
_MOST_BYTES = 64 << 20
"""Of a message of the log that is looked at; a broker takes less unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Publication:
    """A valid ``publish`` message."""

    offset: int
    nonce: str
    """Begins the keys of its pieces."""
    parent: int | None
    files: dict[str, list[int]]
    """Offsets of the pieces of each file, the manifest among them."""
    sha256: str
    """Of the manifest."""


@dataclass(slots=True)
class State:
    """What the log says up to some point."""

    highest: int = -1
    epoch: int = 0
    owners: list[str] = field(default_factory=list)
    """Nonces of the last valid ``take_over`` messages."""
    denied: set[int] = field(default_factory=set)
    marks: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    """Producer -> unix milliseconds and the versions that it uses."""
    published: dict[int, Publication] = field(default_factory=dict)

    def follow(self, offset: int, message: Mapping[str, Any]) -> None:
        """Take one message into account; one that makes no sense changes nothing."""
        with contextlib.suppress(KeyError, TypeError, ValueError):
            self._follow(offset, message)

    def _follow(self, offset: int, message: Mapping[str, Any]) -> None:
        match message:
            case {"kind": "publish", "version": int(version), "epoch": epoch, "nonce": str(nonce)}:
                one = Publication(
                    offset, nonce, message["parent"], message["files"], message["sha256"]
                )
                if version > self.highest and (epoch is None or epoch >= self.epoch):
                    self.highest = version
                    self.published[version] = one
            case {"kind": "take_over", "epoch": int(epoch), "nonce": str(nonce)}:
                if epoch > self.epoch:
                    self.epoch, self.owners = epoch, [*self.owners, nonce][-_OWNERS:]
            case {"kind": "denied", "versions": [*versions]}:
                self.denied = set(versions)
            case {"kind": "use", "producer": str(producer), "versions": [*versions], "at": int(at)}:
                self.marks.pop(producer, None)
                if versions:
                    self.marks[producer] = at, versions
            case {"kind": "prune", "versions": [*versions], "at": int(at)}:
                for version in set(versions) - self.in_use(at):
                    self.published.pop(version, None)

    def in_use(self, now_ms: int) -> set[int]:
        """Versions that living servers marked."""
        fresh = (one for at, one in self.marks.values() if at >= now_ms - IN_USE_STALE_MS)
        return {version for versions in fresh for version in versions}

    def to_json(self) -> dict[str, Any]:
        """Content of a ``state`` message."""
        return {
            "highest": self.highest,
            "epoch": self.epoch,
            "owners": self.owners,
            "denied": sorted(self.denied),
            "marks": {name: [at, versions] for name, (at, versions) in self.marks.items()},
            "published": [
                [version, one.offset, one.nonce, one.parent, one.files, one.sha256]
                for version, one in self.published.items()
            ],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> State:
        """Inverse of ``to_json``."""
        return cls(
            stored["highest"],
            stored["epoch"],
            list(stored["owners"]),
            set(stored["denied"]),
            {name: (at, versions) for name, (at, versions) in stored["marks"].items()},
            {version: Publication(*rest) for version, *rest in stored["published"]},
        )


class VersionLog:
    """Follows ``PREFIX.weights``, and appends to it."""

    def __init__(self, link: KafkaLink) -> None:
        self._link = link
        self._partition = TopicPartition(link.topic("weights"), 0)
        self._state = State()
        self._next: int | None = None
        """Offset of the next message to follow; ``None`` before the first."""
        self._consumer: KafkaConsumer | None = None
        self._sender = Sender(link, "weights", {"cleanup.policy": "delete"})
        self._cannot_shorten = False

    def follow(self) -> State:
        """The state of now; not changed afterwards.

        Raises:
            KafkaError: the brokers do not answer.
            ValueError: messages that are still needed were deleted.
        """
        if self._consumer is None:
            self._consumer = self._link.consumer(self, auto_offset_reset="earliest")
        consumer, partition = self._consumer, self._partition
        if not consumer.partitions_for_topic(partition.topic):
            return self._state
        if not consumer.assignment():
            consumer.assign([partition])
        begin = consumer.beginning_offsets([partition])[partition]
        end = consumer.end_offsets([partition])[partition]
        if self._next is None or not begin <= self._next <= end:
            self._start_over(consumer, begin, end)
        elif self._next < end:
            state = State.from_json(self._state.to_json())
            for offset, message in self._messages(consumer, self._next, end):
                state.follow(offset, message)
            self._state, self._next = state, end
        return self._state

    @property
    def end(self) -> int:
        """Offset of the next message that ``follow`` has not seen."""
        return self._next or 0

    def append(self, message: Mapping[str, Any]) -> State:
        """Append a message, and return the state that includes it.

        Raises:
            KafkaError: it may or may not have been stored.
            OSError: the topic cannot be created.
        """
        sent = self._sender.send(None, json.dumps(message).encode())
        offset: int = sent.get(self._timeout_s).offset

        def is_shown() -> bool:
            self.follow()
            return self.end > offset

        wait_until_shown(is_shown, self._timeout_s)
        return self._state

    def shorten(self) -> None:
        """Delete old messages if there are many.

        Raises:
            KafkaError: it did not work; nothing is lost.
        """
        state, next_ = self.follow(), self._next
        consumer = self._consumer
        if next_ is None or consumer is None or self._cannot_shorten:
            return
        begin = consumer.beginning_offsets([self._partition])[self._partition]
        if next_ - begin < _SHORTEN_AT:
            return
        self.append({"kind": "state", "up_to": next_, "state": state.to_json()})
        self._cannot_shorten = True
        with self._link.admin() as admin:
            admin.delete_records({self._partition: next_})
        self._cannot_shorten = False

    @property
    def _timeout_s(self) -> float:
        return self._link.options.timeout_s

    def _start_over(self, consumer: KafkaConsumer, begin: int, end: int) -> None:
        """Read the whole log. If its front is missing, a ``state`` must say what was there."""
        messages = list(self._messages(consumer, begin, end))
        state, start = State(), 0
        for _, message in messages if begin else ():
            if message.get("kind") == "state" and message["up_to"] >= begin:
                state, start = State.from_json(message["state"]), message["up_to"]
        if begin and not start:
            raise ValueError(
                f"{self._partition.topic} has lost its first {begin} messages, so nobody knows "
                f"which versions were used: set its retention.ms and retention.bytes to -1, and "
                f"begin again under another prefix"
            )
        for offset, message in messages:
            if offset >= start:
                state.follow(offset, message)
        self._state, self._next = state, end

    def _messages(
        self, consumer: KafkaConsumer, begin: int, end: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Offsets and content of messages; those that are no JSON objects are passed over."""
        consumer.seek(self._partition, begin)
        while begin < end:
            found = consumer.poll(timeout_ms=self._link.timeout_ms)
            if not found:
                raise KafkaTimeoutError("there are messages, but none arrives")
            for message in found[self._partition]:
                begin = message.offset + 1
                if message.offset < end and (content := _content_of(message)) is not None:
                    yield message.offset, content


class VersionFiles:
    """Writes, reads and removes content in ``PREFIX.files``."""

    def __init__(self, link: KafkaLink) -> None:
        self._link = link
        self._partition = TopicPartition(link.topic("files"), 0)
        self._consumer: KafkaConsumer | None = None
        self._sender = Sender(link, "files", {"cleanup.policy": "compact"})

    def write(self, nonce: str, files: Mapping[str, Content | Sealed]) -> dict[str, list[int]]:
        """Store files, and return the offsets of their pieces.

        Raises:
            KafkaError: not all of it was stored.
            OSError: the topic cannot be created.
        """
        places: dict[str, list[int]] = {}
        sent: deque[tuple[list[int], Any]] = deque()
        for name, content in files.items():
            places[name] = []
            view = memoryview(plain(content))
            for index, start in enumerate(range(0, len(view), PIECE_BYTES)):
                piece = view[start : start + PIECE_BYTES]
                sent.append((places[name], self._sender.send(_key(nonce, name, index), piece)))
                if len(sent) >= _AT_ONCE:
                    self._take(sent)
        while sent:
            self._take(sent)
        return places

    def read(self, nonce: str, name: str, offsets: list[int]) -> Iterator[bytes]:
        """Pieces of one file.

        Raises:
            KafkaError: the brokers do not answer.
            OSError: a piece is gone.
        """
        if self._consumer is None:
            self._consumer = self._link.consumer(
                self,
                auto_offset_reset="none",
                max_partition_fetch_bytes=2 * PIECE_BYTES,
                fetch_max_bytes=2 * PIECE_BYTES,
            )
        if not self._consumer.partitions_for_topic(self._partition.topic):
            raise OSError(f"there is no topic {self._partition.topic}")
        num_read = 0
        found = fetch_at(self._consumer, self._partition, offsets, self._link.options.timeout_s)
        for index, message in enumerate(found):
            if message.key != _key(nonce, name, index) or message.value is None:
                break
            num_read += 1
            yield message.value
        if num_read < len(offsets):
            raise OSError(f"piece {num_read} of {len(offsets)} is gone")

    def remove(self, nonce: str, places: Mapping[str, list[int]]) -> None:
        """Write tombstones, so that compaction removes these files.

        Raises:
            KafkaError: not all were stored.
        """
        futures = [
            self._sender.send(_key(nonce, name, index), None)
            for name, offsets in places.items()
            for index in range(len(offsets))
        ]
        for future in futures:
            future.get(self._link.options.timeout_s)

    def _take(self, sent: deque[tuple[list[int], Any]]) -> None:
        offsets, future = sent.popleft()
        offsets.append(future.get(self._link.options.timeout_s).offset)


def watch(link: KafkaLink, notify: Callable[[], None], stopping: threading.Event) -> None:
    """Call ``notify`` after each publication until ``stopping`` is set."""
    partition = TopicPartition(link.topic("weights"), 0)
    while not stopping.is_set():
        consumer = None
        try:
            consumer = link.consumer(
                stopping, auto_offset_reset="latest", fetch_max_wait_ms=_WATCH_MS
            )
            while not consumer.partitions_for_topic(partition.topic):
                if stopping.wait(_WATCH_MS / 1000):
                    return
            consumer.assign([partition])
            consumer.seek_to_end(partition)
            consumer.position(partition, timeout_ms=link.timeout_ms)
            notify()  # of what was published before
            while not stopping.is_set():
                found = consumer.poll(timeout_ms=_WATCH_MS)
                contents = map(_content_of, found.get(partition, ()))
                if any(one is not None and one.get("kind") == "publish" for one in contents):
                    notify()
        except KafkaError as error:
            log.debug("watching %s: %s", link.address.location, type(error).__name__)
            stopping.wait(_WATCH_MS / 1000)
        finally:
            if consumer is not None:
                close_consumer(consumer)


def _key(nonce: str, name: str, index: int) -> bytes:
    return f"{nonce}/{name}/{index}".encode()


def _content_of(message: Any) -> dict[str, Any] | None:
    """A message of the log; ``None`` if it is no JSON object."""
    with contextlib.suppress(ValueError, TypeError):
        content = parse_small_json(message.value, _MOST_BYTES)
        if isinstance(content, dict):
            return content
    return None
