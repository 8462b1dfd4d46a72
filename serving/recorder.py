"""Takes finished traces off the engine's hands and writes them to the buffer, on its own thread.

consumes: finished traces, bounded; the oldest is dropped and counted when full.
waits for: the disk. The engine never does.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from buffer.codec import encode_trace
from buffer.records import Trace

log = logging.getLogger(__name__)


class TraceWriter(Protocol):
    """The part of the buffer's writer that is used here."""

    def append(self, payload: bytes) -> int: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class Recorder:
    """Background writer of traces."""

    def __init__(self, writer: TraceWriter, max_queue: int, sync_interval_s: float) -> None:
        self._writer = writer
        self._max_queue = max_queue
        self._sync_interval_s = sync_interval_s
        self._queue: deque[Callable[[], Trace]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, make_trace: Callable[[], Trace]) -> None:
        """Hand over one finished trace; O(1). It is built and encoded on the recorder's thread."""
        with self._wake:
            self._counts["queued"] += 1
            self._queue.append(make_trace)
            if len(self._queue) > self._max_queue:
                self._queue.popleft()
                self._counts["dropped"] += 1
            self._wake.notify()

    def counts(self) -> dict[str, int]:
        """``queued`` = ``written`` + ``dropped`` + ``failed`` + those still on their way."""
        with self._wake:
            return {k: self._counts[k] for k in ("queued", "written", "dropped", "failed")}

    def close(self, timeout_s: float) -> None:
        """Write what is queued, sync, stop. Bounded by ``timeout_s``."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        unsynced = 0
        while True:
            with self._wake:
                if not self._queue and not self._closing:
                    self._wake.wait(self._sync_interval_s if unsynced else None)
                batch = list(self._queue)
                self._queue.clear()
                closing = self._closing
            unsynced += self._write(batch)
            if unsynced and (closing or not batch or unsynced >= 64):
                self._sync(unsynced)
                unsynced = 0
            if closing and not batch:
                self._writer.close()
                return

    def _write(self, batch: list[Callable[[], Trace]]) -> int:
        written = 0
        for make_trace in batch:
            try:
                self._writer.append(encode_trace(make_trace()))
                written += 1
            except OSError as error:
                log.warning("trace lost: the buffer cannot be written (%s); serving goes on", error)
                self._count("failed", 1)
        return written

    def _sync(self, count: int) -> None:
        try:
            self._writer.sync()
            self._count("written", count)
        except OSError as error:
            log.warning("%d traces lost: sync failed (%s); serving goes on", count, error)
            self._count("failed", count)

    def _count(self, name: str, by: int) -> None:
        with self._wake:
            self._counts[name] += by
