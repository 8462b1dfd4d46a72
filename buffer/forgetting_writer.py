"""A trace writer that drops what was deleted while it was on its way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from buffer.counts import WriterCounts
from buffer.deletions import Deletions, DeletionWatch, now_ms
from buffer.interface import Payload, TraceWriter

_LATE_MS = 3_600_000
"""Longest that a record is on its way to the writer: to look whose it is takes 0.1 ms, which is
spared once all deletions are older. Readers go by the whole list."""
LOOK_S = 2.0
"""Seconds between two looks for deletions."""
_SOON_S = 5 * LOOK_S
"""A deletion that was not listed so long ago was made just now."""


class ForgettingWriter(TraceWriter):
    """Looks for deletions on a thread of its own: a service that hangs delays no record.

    Its numbers of records are those of the writer below.
    """

    def __init__(
        self,
        below: TraceWriter,
        read: Callable[[], Deletions],
        every_s: float = LOOK_S,
        *,
        now: Callable[[], int] = now_ms,
    ) -> None:
        """
        Args:
            below: used by nobody else from now on.
            read: reads the buffer's list of deletions.
            every_s: seconds between two looks.
            now: unix ms, by the clock that stamps the traces.
        """
        self._below = below
        self._watch = DeletionWatch(read, every_s=0.0)
        self._now = now
        self._listed = Deletions()
        """As the buffer listed them at the last look."""
        self._here = Deletions()
        """The same, with those that were made while this writer looked holding until it saw them,
        by the clock that traces here are stamped with: whatever waits here came before."""
        self._applied = Deletions()
        """Those that what waits below was held against."""
        self._recent = Deletions()
        """Those that may cover a record that comes now."""
        self._num_dropped = 0
        self._stopping = threading.Event()
        threading.Thread(
            target=self._look_often, args=(every_s,), name="deletions", daemon=True
        ).start()

    @property
    def name(self) -> str:
        return self._below.name

    @property
    def counts(self) -> WriterCounts:
        counts, dropped = self._below.counts, self._num_dropped
        return replace(counts, appended=counts.appended + dropped, deleted=counts.deleted + dropped)

    def append(self, payload: Payload) -> int:
        return self._below.append(payload)

    def append_all(self, payloads: Sequence[Payload]) -> list[OSError]:
        deletions = self._recent
        kept = [one for one in payloads if not deletions.covers_record(one)]
        self._num_dropped += len(payloads) - len(kept)
        return self._below.append_all(kept)

    def sync(self) -> range:
        return self._below.sync()

    def tend(self) -> range:
        self._forget()
        return self._below.tend()

    def remove(self, is_unwanted: Callable[[Payload], bool]) -> int:
        return self._below.remove(is_unwanted)

    def close(self) -> None:
        self._stopping.set()
        self._forget()
        self._below.close()

    def _forget(self) -> None:
        """Remove what waits below and was deleted since the last time."""
        deletions = self._here
        if deletions != self._applied:
            self._below.remove(deletions.covers_record)
            self._applied = deletions

    def _look_often(self, every_s: float) -> None:
        while not self._stopping.wait(every_s):
            self.look()

    def look(self) -> None:
        """Look for deletions now; the writer's thread does so every ``every_s``."""
        before_s, now = self._watch.read_s, self._now()
        listed = self._watch.look()
        if self._watch.read_s is None or self._watch.read_s == before_s:
            return  # the buffer is away
        if before_s is None or self._watch.read_s - before_s > _SOON_S:
            self._here = listed  # a new one may have been made long ago
        elif listed != self._listed:
            self._here = Deletions(
                {digest: self._until_ms(digest, listed, now) for digest in listed.until_ms}
            )
        self._listed = listed
        self._recent = self._here.since(now - _LATE_MS)

    def _until_ms(self, digest: str, listed: Deletions, now: int) -> int:
        until_ms = listed.until_ms[digest]
        if self._listed.until_ms.get(digest) == until_ms:
            return self._here.until_ms[digest]
        return max(until_ms, now)
