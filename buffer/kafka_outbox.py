"""Records of a Kafka writer that are not acknowledged yet."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from buffer.interface import Payload


@dataclass(slots=True, eq=False)
class Waiting:
    """A record that is not acknowledged yet."""

    number: int
    payload: Payload
    appended_s: float
    """Monotonic time, seconds."""
    pieces: list[Any] = field(default_factory=list)
    """Futures of its pieces, once they are sent."""
    future: Any = None
    """Of its message, once that is sent."""


class Outbox:
    """Records in order: those that the client has, then those that wait for it."""

    def __init__(self, max_waiting_bytes: int) -> None:
        self.sent: deque[Waiting] = deque()
        self.waiting: deque[Waiting] = deque()
        self.sent_bytes = 0
        self.appended = self.durable = self.dropped = self.doubtful = self.removed = 0
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._acknowledged: deque[range] = deque()

    def add(self, payload: Payload) -> int:
        """Take a record; the oldest that wait are dropped if there is no room."""
        number = self.appended
        self.appended += 1
        self.waiting.append(Waiting(number, payload, time.monotonic()))
        self._waiting_bytes += len(payload)
        while self._waiting_bytes > self._max_waiting_bytes and len(self.waiting) > 1:
            # One whose pieces are on their way is finished instead.
            oldest = 1 if self.waiting[0].pieces and len(self.waiting) > 2 else 0
            self._waiting_bytes -= len(self.waiting[oldest].payload)
            del self.waiting[oldest]
            self.dropped += 1
        return number

    def is_full(self, more_bytes: int) -> bool:
        """Whether so many more bytes would drop something."""
        return self._waiting_bytes + more_bytes > self._max_waiting_bytes

    def is_sent(self) -> None:
        """The first that waited was handed to the client."""
        record = self.waiting.popleft()
        self._waiting_bytes -= len(record.payload)
        self.sent_bytes += len(record.payload)
        self.sent.append(record)

    def is_acknowledged(self) -> Waiting:
        """The first that was sent is stored."""
        record = self.sent.popleft()
        self.sent_bytes -= len(record.payload)
        self.durable += 1
        if self._acknowledged and self._acknowledged[-1].stop == record.number:
            self._acknowledged[-1] = range(self._acknowledged[-1].start, record.number + 1)
        else:  # those between were dropped
            self._acknowledged.append(range(record.number, record.number + 1))
        return record

    def send_again(self) -> None:
        """All that was sent and not acknowledged waits once more."""
        for record in self.waiting:
            record.pieces = []
        for record in reversed(self.sent):
            record.future, record.pieces = None, []
            self.waiting.appendleft(record)
            self._waiting_bytes += len(record.payload)
        self.sent.clear()
        self.sent_bytes = 0

    def remove(self, is_unwanted: Callable[[Payload], bool]) -> int:
        """Remove some of those of which nothing was sent yet; returns how many."""
        kept = deque(one for one in self.waiting if one.pieces or not is_unwanted(one.payload))
        num_removed = len(self.waiting) - len(kept)
        self._waiting_bytes = sum(len(one.payload) for one in kept)
        self.removed += num_removed
        self.waiting = kept
        return num_removed

    def drop_older(self, age_s: float) -> None:
        """Drop those of which nothing was sent and that wait for longer than this."""
        oldest_s = time.monotonic() - age_s
        while self.waiting and not self.waiting[0].pieces and self.waiting[0].appended_s < oldest_s:
            self._waiting_bytes -= len(self.waiting.popleft().payload)
            self.dropped += 1

    def give_up(self) -> None:
        """Count what is left: sent is doubtful, the rest was never sent."""
        self.doubtful += len(self.sent)
        self.dropped += len(self.waiting)
        self.sent.clear()
        self.waiting.clear()
        self.sent_bytes = self._waiting_bytes = 0

    @property
    def oldest_s(self) -> float | None:
        """Monotonic time at which the oldest record was appended."""
        first = self.sent or self.waiting
        return first[0].appended_s if first else None

    def take_acknowledged(self) -> range:
        """Numbers acknowledged since the last call; where dropped ones lie between, the rest comes
        with the next calls."""
        return (
            self._acknowledged.popleft()
            if self._acknowledged
            else range(self.appended, self.appended)
        )
