"""Writes finished traces to the buffer on its own thread.

Consumes: finished traces from a bounded queue; when it is full, the oldest is dropped and counted.
Waits for: the disk. The engine never does.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable

from buffer.codec import encode_trace
from buffer.interface import TraceWriter
from buffer.records import Trace

log = logging.getLogger(__name__)


class Recorder:
    """Background writer of traces."""

    def __init__(self, writer: TraceWriter, max_queue: int, sync_interval_s: float) -> None:
        self._writer = writer
        self._max_queue = max_queue
        self._sync_interval_s = sync_interval_s
        self._queue: deque[Callable[[], Trace | None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, make_trace: Callable[[], Trace | None]) -> None:
        """Queue one finished trace, in O(1). It is built and encoded on the recorder's thread.

        Args:
            make_trace: builds the trace; returns ``None`` if it is too late to build it, and the
                trace then counts as dropped.
        """
        with self._wake:
            self._counts["queued"] += 1
            self._queue.append(make_trace)
            if len(self._queue) > self._max_queue:
                self._queue.popleft()
                self._counts["dropped"] += 1
            self._wake.notify()

    def counts(self) -> dict[str, int]:
        """Traces by outcome: ``queued`` = ``written`` + ``dropped`` + ``failed`` + in progress.

        ``written`` traces are acknowledged by the buffer; ``failed`` ones were refused by it or
        never acknowledged.
        """
        kept = self._writer.counts
        with self._wake:
            return {
                "queued": self._counts["queued"],
                "written": kept.durable,
                "dropped": self._counts["dropped"],
                "failed": self._counts["failed"] + kept.doubtful,
            }

    def close(self, timeout_s: float) -> None:
        """Write what is queued, sync and stop, within ``timeout_s`` seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._queue and not self._closing:
                    self._wake.wait(self._sync_interval_s)
                batch = list(self._queue)
                self._queue.clear()
                closing = self._closing
            for make_trace in batch:
                self._write(make_trace)
            self._tend(closing and not batch)
            if closing and not batch:
                return

    def _write(self, make_trace: Callable[[], Trace | None]) -> None:
        try:
            trace = make_trace()
            if trace is None:
                with self._wake:
                    self._counts["dropped"] += 1
                return
            self._writer.append(encode_trace(trace))
        except (OSError, ValueError) as error:
            log.warning("a trace is lost: it cannot be written (%s); serving continues", error)
            with self._wake:
                self._counts["failed"] += 1

    def _tend(self, last: bool) -> None:
        try:
            if last:
                self._writer.close()
            else:
                self._writer.tend()
        except OSError as error:
            log.warning("the disk did not acknowledge traces (%s); serving continues", error)
