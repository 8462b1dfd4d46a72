"""Writes finished traces to the buffer, on two threads of its own.

The first copies a trace out of the capture ring, which is being overwritten, and encodes it. The
second writes and syncs, so that a slow disk delays no copy.

Consumes: finished traces from a bounded queue; when it is full, the oldest is dropped and counted.
Waits for: the disk. The engine never does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping

from buffer.counts import WriterCounts
from buffer.interface import Payload, TraceWriter

log = logging.getLogger(__name__)

EncodeTrace = Callable[[], Payload | None]
"""Encodes a finished trace, on the recorder's thread; ``None`` if it is too late for that."""

_AT_ONCE = 16  # traces encoded before they are handed on: fewer turns of the interpreter's lock
_LEAST_WAIT_S = 0.01  # with buffer.sync_interval_s at 0, every write is synced at once
_SAY_EVERY_S = 10.0


DONE = ("written", "dropped", "failed", "withheld", "deleted")
"""What becomes of a trace that was queued."""


def num_waiting(counts: Mapping[str, int]) -> int:
    """Traces that are still in progress, by ``Recorder.counts``."""
    return counts["queued"] - sum(counts.get(name, 0) for name in DONE)


class WithheldError(ValueError):
    """A trace must not leave the server."""


class Recorder:
    """Background writer of traces."""

    def __init__(
        self,
        writer: TraceWriter,
        max_queue: int,
        sync_interval_s: float,
        max_waiting_bytes: int,
    ) -> None:
        """
        Args:
            writer: used by nobody else from now on.
            max_queue: finished traces that may wait to be encoded.
            sync_interval_s: seconds between two group commits.
            max_waiting_bytes: encoded traces that may wait for the disk.
        """
        self._writer = writer
        self._max_queue = max_queue
        self._tend_every_s = max(sync_interval_s, _LEAST_WAIT_S)
        self._max_waiting_bytes = max_waiting_bytes
        self._finished: deque[EncodeTrace] = deque()
        self._records: list[Payload] = []
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        """Guards all of the above and the counts."""
        self._may_encode = threading.Condition(self._lock)
        """There are finished traces, or there is room for encoded ones."""
        self._may_write = threading.Condition(self._lock)
        """There are encoded traces, or all were encoded."""
        self._said_s: dict[tuple[type, int | None], float] = {}
        """Kind of an error -> monotonic time at which one was logged last."""
        self._closing = False
        self._all_encoded = False
        self._counts: Counter[str] = Counter()
        self._threads = [
            threading.Thread(target=self._encode_all, name="recorder", daemon=True),
            threading.Thread(target=self._write_all, name="trace-writer", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def put(self, encode_trace: EncodeTrace) -> None:
        """Queue one finished trace, in O(1). A trace that ``encode_trace`` comes too late for
        counts as dropped."""
        with self._lock:
            self._counts["queued"] += 1
            self._finished.append(encode_trace)
            if len(self._finished) > self._max_queue:
                self._finished.popleft()
                self._counts["dropped"] += 1
            self._may_encode.notify()

    def counts(self) -> dict[str, int]:
        """Traces by outcome: ``queued`` = ``written`` + ``dropped`` + ``failed`` + ``withheld`` +
        ``deleted`` + in progress.

        ``written`` traces are acknowledged by the buffer; ``failed`` ones were refused by it, never
        acknowledged, or given up while its service was away. ``withheld`` ones were kept back by
        ``capture.redact``, or it failed; ``deleted`` ones had not left when their tenant was. Of
        those written, ``missing`` ones are gone because somebody deleted their files, not because
        they were evicted. ``recovered`` and ``unrecovered`` ones, where there are any, are beside
        all of these: ended processes had left them in the disk's spool.
        """
        kept = self._writer.counts  # first: what is done with had been queued
        with self._lock:
            counts = {
                "queued": self._counts["queued"],
                "written": kept.durable,
                "dropped": self._counts["dropped"],
                "failed": self._counts["failed"] + kept.doubtful + kept.dropped,
                "withheld": self._counts["withheld"],
                "deleted": kept.deleted,
                "missing": kept.missing,
                **self._of_former_processes(kept),
            }
            if self._counts["given up"]:  # a thread that hung may still write some of them
                counts["dropped"] += num_waiting(counts)
            return counts

    @staticmethod
    def _of_former_processes(kept: WriterCounts) -> dict[str, int]:
        found = {"recovered": kept.recovered, "unrecovered": kept.unrecovered}
        return found if any(found.values()) else {}

    def close(self, timeout_s: float) -> None:
        """Write what is queued, sync and stop, within ``timeout_s`` seconds. What is not written by
        then counts as dropped."""
        with self._lock:
            self._closing = True
            self._may_encode.notify()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline_s - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            left = num_waiting(self.counts())
            with self._lock:
                self._counts["given up"] = 1
            log.warning(
                "%d traces were not written within %g s of the end: they are lost, and counted as "
                "dropped",
                left,
                timeout_s,
            )

    # ---- from the ring to memory ---------------------------------------------------------------

    def _encode_all(self) -> None:
        while batch := self._take_finished():
            records = [record for record in map(self._encode, batch) if record is not None]
            with self._lock:
                self._records += records
                self._waiting_bytes += sum(map(len, records))
                self._may_write.notify()
        with self._lock:
            self._all_encoded = True
            self._may_write.notify()

    def _take_finished(self) -> list[EncodeTrace]:
        """The next traces, once there is room for them; none once all are encoded."""

        def can_go_on() -> bool:
            has_room = self._waiting_bytes < self._max_waiting_bytes
            return has_room if self._finished else self._closing

        with self._lock:
            self._may_encode.wait_for(can_go_on)
            return [self._finished.popleft() for _ in range(min(_AT_ONCE, len(self._finished)))]

    def _encode(self, encode_trace: EncodeTrace) -> Payload | None:
        try:
            record = encode_trace()
        except WithheldError:
            with self._lock:
                self._counts["withheld"] += 1
            return None
        except Exception as error:  # a fault of ours must not end the thread unseen
            self._has_failed([error])
            return None
        if record is None:
            with self._lock:
                self._counts["dropped"] += 1
        return record

    # ---- from memory to the disk ---------------------------------------------------------------

    def _write_all(self) -> None:
        is_last = False
        while not is_last:
            with self._lock:
                self._may_write.wait_for(
                    lambda: self._records or self._all_encoded, self._tend_every_s
                )
                records, self._records = self._records, []
                is_last = self._all_encoded and not records
            self._has_failed(self._writer.append_all(records))
            with self._lock:
                self._waiting_bytes -= sum(map(len, records))
                self._may_encode.notify()
            self._tend(is_last)

    def _tend(self, is_last: bool) -> None:
        try:
            if is_last:
                self._writer.close()
            else:
                self._writer.tend()
        except OSError as error:
            self._say("the buffer did not acknowledge traces", error)

    def _has_failed(self, errors: Iterable[Exception]) -> None:
        for error in errors:
            self._say("a trace is lost: it cannot be written", error)
            with self._lock:
                self._counts["failed"] += 1

    def _say(self, what: str, error: Exception) -> None:
        """Warn of each kind of error, at most once in ``_SAY_EVERY_S``: a disk that stays full
        refuses every trace."""
        now_s, kind = time.monotonic(), (type(error), getattr(error, "errno", None))
        if now_s - self._said_s.get(kind, -_SAY_EVERY_S) >= _SAY_EVERY_S:
            self._said_s[kind] = now_s
            log.warning(
                "%s (%s); serving continues, and all are counted (traces_total)", what, error
            )
