"""Writes traces to the process that holds the buffer in memory."""

from __future__ import annotations

import errno
from dataclasses import asdict
from pathlib import Path
from typing import Any

from buffer.interface import Payload, ServiceAwayError, TraceLimits
from buffer.memory import DEFAULT_BYTES
from buffer.socket_messages import BATCH_BYTES, error_of, written_of
from buffer.socket_wire import Line, away, connect
from buffer.spooled_writer import SpooledWriter

SPOOL_BYTES = 256 << 20
"""Payload that may wait in the server's memory while nobody holds the buffer."""


class SocketWriter(SpooledWriter):
    """Records wait in memory until their holder confirms them; the oldest are dropped when there
    are too many."""

    def __init__(self, path: Path, limits: TraceLimits, spool_bytes: int = SPOOL_BYTES) -> None:
        super().__init__(
            limits,
            max_bytes=DEFAULT_BYTES if limits.max_bytes is None else limits.max_bytes,
            spool_bytes=spool_bytes,
            batch_bytes=BATCH_BYTES,
        )
        self._path = path
        self._line: Line | None = None
        self._base = 0
        """Records stored before the present holder began."""
        self._evicted_here = (0, 0)
        """Records and bytes, by the present holder."""

    @property
    def _evicted(self) -> tuple[int, int]:
        return self._evicted_here

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
        about = {"op": "write", "name": self._name, "limits": asdict(self._limits)}
        have = self._ask(about)
        if have < self._stored - self._base:
            self._base = self._stored - have
            self._evicted_here = (0, 0)

    def _ask(self, header: dict[str, Any], records: list[Payload] | None = None) -> int:
        """Send a request; returns how many records of this writer the holder has."""
        assert self._line is not None
        try:
            self._line.send(header, records or ())
            answer, _ = self._line.receive()
            problem = error_of(answer)
            if problem is not None:
                raise OSError(errno.EREMOTEIO, str(problem))
            have, self._evicted_here = written_of(answer)
        except OSError as error:
            self._hang_up()
            self._breaker.failed()
            raise away(self._path, error.strerror or str(error)) from None
        self._breaker.worked()
        return have

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
