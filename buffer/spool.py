"""Records that wait in memory for a service, and when to try a service again that failed."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable

from buffer.interface import Payload

_JITTER = random.Random()  # of its own: the one of the module belongs to the caller


class Spool:
    """Records that wait to be sent, oldest first. Over its limit the oldest unsent are dropped.

    The batch that is on its way stays until ``done`` or ``forget``: the service may have stored it.
    """

    def __init__(self, max_bytes: int) -> None:
        """
        Args:
            max_bytes: payload bytes that may wait.
        """
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[int, float, Payload]] = deque()
        """Number, monotonic time of ``add``, and payload."""
        self._batch: list[tuple[int, float, Payload]] = []
        self.num_bytes = 0
        """Payload bytes of all of them, the batch included."""
        self.added = 0
        self.dropped = 0
        self.removed = 0

    def __len__(self) -> int:
        return len(self._batch) + len(self._waiting)

    @property
    def batch(self) -> list[Payload]:
        """The records on their way."""
        return [payload for _, _, payload in self._batch]

    @property
    def age_s(self) -> float:
        """Seconds since the oldest record was added; 0 if there is none."""
        waiting = self._batch or self._waiting
        return time.monotonic() - waiting[0][1] if waiting else 0.0

    def is_full(self, more_bytes: int) -> bool:
        """Whether so many more bytes would drop something."""
        return self.num_bytes + more_bytes > self._max_bytes

    def add(self, payload: Payload) -> int:
        """Append a record and return its number, from 0. Drops the oldest unsent ones for it."""
        self._waiting.append((self.added, time.monotonic(), payload))
        self.num_bytes += len(payload)
        self.added += 1
        while self.num_bytes > self._max_bytes and len(self._waiting) > 1:
            self.num_bytes -= len(self._waiting.popleft()[2])
            self.dropped += 1
        return self.added - 1

    def begin(self, max_records: int, max_bytes: int) -> bool:
        """Make a batch of the oldest records, at least one, unless one is on its way already.

        Returns:
            Whether there is a batch now.
        """
        if self._batch:
            return True
        num_bytes = 0
        while self._waiting and len(self._batch) < max_records:
            num_bytes += len(self._waiting[0][2])
            if self._batch and num_bytes > max_bytes:
                break
            self._batch.append(self._waiting.popleft())
        return bool(self._batch)

    def done(self) -> range:
        """The batch was stored.

        Returns:
            Numbers from its first record to its last; of those between, some may have been dropped.
        """
        numbers = range(self._batch[0][0], self._batch[-1][0] + 1)
        self.forget()
        return numbers

    def forget(self) -> int:
        """Give the batch up; returns its number of records."""
        self.num_bytes -= sum(len(payload) for _, _, payload in self._batch)
        num_records, self._batch = len(self._batch), []
        return num_records

    def remove(self, is_unwanted: Callable[[Payload], bool]) -> int:
        """Remove some of those that are not on their way; returns how many."""
        kept = deque(one for one in self._waiting if not is_unwanted(one[2]))
        num_removed = len(self._waiting) - len(kept)
        self.num_bytes -= sum(len(one[2]) for one in self._waiting) - sum(len(k[2]) for k in kept)
        self.removed += num_removed
        self._waiting = kept
        return num_removed

    def drop_older(self, age_s: float) -> None:
        """Drop those that wait for longer than this, but not what is on its way."""
        oldest_s = time.monotonic() - age_s
        while self._waiting and self._waiting[0][1] < oldest_s:
            self.num_bytes -= len(self._waiting.popleft()[2])
            self.dropped += 1

    def drop_all(self) -> None:
        """Drop everything that is not on its way."""
        self.dropped += len(self._waiting)
        self.num_bytes -= sum(len(payload) for _, _, payload in self._waiting)
        self._waiting.clear()


class Breaker:
    """Keeps callers from a service that failed, for a while that doubles from failure to failure.

    The while is drawn from its upper half, so that many clients do not come back at once.
    """

    def __init__(
        self,
        first_s: float = 0.05,
        longest_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            first_s: pause after the first failure, seconds.
            longest_s: longest pause, seconds.
        """
        self._first_s, self._longest_s = first_s, longest_s
        self._clock = clock
        self._failures = 0
        self._next_try_s = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether the service may be tried."""
        return self._clock() >= self._next_try_s

    def failed(self) -> None:
        """The service failed: leave it alone for a while."""
        pause_s = min(self._longest_s, self._first_s * 2.0 ** min(self._failures, 30))
        self._failures += 1
        self._next_try_s = self._clock() + pause_s * _JITTER.uniform(0.5, 1.0)

    def worked(self) -> None:
        """The service answered."""
        self._failures, self._next_try_s = 0, 0.0
