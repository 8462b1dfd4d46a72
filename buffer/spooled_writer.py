"""A trace writer whose records wait in memory until a service has confirmed their batch."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from abc import abstractmethod
from collections.abc import Callable

from buffer.counts import WriterCounts
from buffer.interface import Payload, ServiceAwayError, TraceLimits, TraceWriter, check_record
from buffer.spool import Breaker, Spool

_BATCH_RECORDS = 256


class SpooledWriter(TraceWriter):
    """What such writers share. A subclass sends a batch, and says in ``tend`` when it is due."""

    def __init__(
        self, limits: TraceLimits, *, max_bytes: int, spool_bytes: int, batch_bytes: int
    ) -> None:
        """
        Args:
            max_bytes: what the buffer may hold.
            spool_bytes: payload that may wait; the oldest records are dropped for newer ones.
            batch_bytes: payload of a batch at most, unless a single record has more.
        """
        self._limits = limits
        self._max_bytes = max_bytes
        self._batch_bytes = batch_bytes
        self._name = f"w{os.getpid()}-{int(time.time() * 1000)}-{secrets.token_hex(4)}"
        self._spool = Spool(spool_bytes)
        self._breaker = Breaker()
        self._stored = self._doubtful = 0

    @abstractmethod
    def _send_batch(self) -> None:
        """Store ``self._spool.batch`` and count it in ``self._stored``. Tells the breaker how it
        went.

        Raises:
            ServiceAwayError: the service did not confirm it.
        """

    @abstractmethod
    def _hang_up(self) -> None:
        """Close the connection to the service, if there is one."""

    @property
    @abstractmethod
    def _evicted(self) -> tuple[int, int]:
        """Records and bytes that this writer had to evict."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def counts(self) -> WriterCounts:
        evicted_records, evicted_bytes = self._evicted
        durable, doubtful = self._stored, self._doubtful
        dropped, deleted = self._spool.dropped, self._spool.removed
        appended = self._spool.added  # last: another thread may ask, and none is owed to it then
        return WriterCounts(
            appended=appended,
            durable=durable,
            pending=appended - durable - doubtful - dropped - deleted,
            doubtful=doubtful,
            evicted_records=evicted_records,
            evicted_bytes=evicted_bytes,
            dropped=dropped,
            deleted=deleted,
        )

    def append(self, payload: Payload) -> int:
        """Take one record. If there is no room for it, send what waits or, while the service is
        away, drop the oldest."""
        check_record(len(payload), self._max_bytes)
        if self._spool.is_full(len(payload)) and self._breaker.is_closed:
            with contextlib.suppress(ServiceAwayError):  # ``tend`` says so
                self._send_all()
        return self._spool.add(payload)

    def sync(self) -> range:
        """Send everything that waits, even if the service failed a moment ago."""
        return self._send_all()

    def remove(self, is_unwanted: Callable[[Payload], bool]) -> int:
        return self._spool.remove(is_unwanted)

    def close(self) -> None:
        try:
            self._send_all()
        finally:
            self._doubtful += self._spool.forget()
            self._spool.drop_all()
            self._hang_up()

    def _send_all(self) -> range:
        first, end = None, self._spool.added
        while self._spool.begin(_BATCH_RECORDS, self._batch_bytes):
            self._send_batch()
            numbers = self._spool.done()
            first, end = numbers.start if first is None else first, numbers.stop
        return range(end if first is None else first, end)
