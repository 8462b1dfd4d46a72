"""Writes traces to the process that holds the buffer in memory."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from buffer.counts import WriterCounts
from buffer.interface import Payload, ServiceAwayError, TraceLimits, TraceWriter, check_record
from buffer.memory import DEFAULT_BYTES
from buffer.socket_wire import Line, away, connect
from buffer.spool import Breaker, Spool

SPOOL_BYTES = 256 << 20
"""Payload that may wait in the server's memory while nobody holds the buffer."""
_BATCH_BYTES = 8 << 20
_BATCH_RECORDS = 256


class SocketWriter(TraceWriter):
    """Records wait in memory until their holder confirms them; the oldest are dropped when there
    are too many."""

    def __init__(self, path: Path, limits: TraceLimits, spool_bytes: int = SPOOL_BYTES) -> None:
        self._path = path
        self._limits = limits
        self._max_bytes = DEFAULT_BYTES if limits.max_bytes is None else limits.max_bytes
        self._session = f"w{os.getpid()}-{int(time.time() * 1000)}-{secrets.token_hex(4)}"
        self._spool = Spool(spool_bytes)
        self._breaker = Breaker()
        self._line: Line | None = None
        self._stored = self._doubtful = 0
        self._base = 0
        """Records stored before the present holder began."""
        self._evicted = [0, 0]
        """Records and bytes, by the present holder."""

    @property
    def name(self) -> str:
        return self._session

    @property
    def counts(self) -> WriterCounts:
        return WriterCounts(
            appended=self._spool.added,
            durable=self._stored,
            pending=len(self._spool),
            doubtful=self._doubtful,
            evicted_records=self._evicted[0],
            evicted_bytes=self._evicted[1],
            dropped=self._spool.dropped,
            deleted=self._spool.removed,
        )

    def append(self, payload: Payload) -> int:
        check_record(len(payload), self._max_bytes)
        if self._spool.is_full(len(payload)) and self._breaker.is_closed:
            with contextlib.suppress(ServiceAwayError):  # ``tend`` says so
                self._send_all()
        return self._spool.add(payload)

    def sync(self) -> range:
        return self._send_all()

    def tend(self) -> range:
        newly = range(self._spool.added, self._spool.added)
        self._spool.drop_older(self._limits.ttl_s)
        if not self._breaker.is_closed:
            return newly
        if len(self._spool) and self._spool.age_s >= self._limits.sync_interval_s:
            newly = self._send_all()
        if self._line is not None:
            self._ask({"op": "tend"})
        return newly

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
        while self._spool.begin(_BATCH_RECORDS, _BATCH_BYTES):
            self._send_batch()
            numbers = self._spool.done()
            first, end = numbers.start if first is None else first, numbers.stop
        return range(end if first is None else first, end)

    def _send_batch(self) -> None:
        batch = self._spool.batch
        self._connect()
        header = {
            "op": "append",
            "first": self._stored - self._base,
            "sizes": list(map(len, batch)),
        }
        self._ask(header, batch)
        self._stored += len(batch)

    def _connect(self) -> None:
        """Connect if need be. A holder that has nothing of ours is a new one, or we are new."""
        if self._line is not None:
            return
        try:
            self._line = connect(self._path)
        except ServiceAwayError:
            self._breaker.failed()
            raise
        about = {"op": "write", "name": self._session, "limits": asdict(self._limits)}
        have = self._ask(about)["have"]
        if have < self._stored - self._base:
            self._base = self._stored - have
            self._evicted = [0, 0]

    def _ask(self, header: dict[str, Any], records: list[Payload] | None = None) -> dict[str, Any]:
        assert self._line is not None
        try:
            self._line.send(header, records or ())
            answer, _ = self._line.receive()
            if "error" in answer:
                raise OSError(answer["errno"], answer["error"])
        except OSError as error:
            self._hang_up()
            self._breaker.failed()
            raise away(self._path, error.strerror or str(error)) from None
        self._breaker.worked()
        self._evicted = answer.get("evicted", self._evicted)
        return answer

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
