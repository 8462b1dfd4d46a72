"""The way of records to a writer: a bounded queue, a thread, and a process.

The thread hands one record at a time to the process and waits for its answer. So if the writer
hangs, the thread waits, the queue fills, and the oldest records are dropped and counted; whoever
puts records in never waits. The process has a session of its own: signals that end a server do not
reach it, and it ends when its input does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

from reporting.records import Greeting, Record

log = logging.getLogger(__name__)

_MODULE = "reporting"


class Channel:
    """Takes records for one writer."""

    def __init__(
        self,
        greeting: Greeting,
        most: int,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            most: records that may wait.
            command: runs the writer's process; ``None``: our own.
            environment: added to that of this process.
        """
        self.name = greeting.writer
        self._greeting = greeting
        self._command = command or [sys.executable, "-P", "-m", _MODULE]
        self._environment = dict(environment or {})
        self._waiting: deque[Record] = deque()
        self._most = most
        self._changed = threading.Condition()
        """Guards the queue and the counts."""
        self._counts = {"written": 0, "dropped": 0, "failed": 0}
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name=f"report-{self.name}", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Queue a record; never waits. The oldest one makes room."""
        with self._changed:
            if len(self._waiting) >= self._most or self._closing:
                self._counts["dropped"] += 1
                if self._closing or not self._waiting:
                    return
                self._waiting.popleft()
            self._waiting.append(record)
            self._changed.notify()

    def counts(self) -> dict[str, int]:
        """Records ``written``; ``dropped``, because the writer was too slow or has ended;
        ``failed``, because it could not write them."""
        with self._changed:
            return dict(self._counts)

    def close(self, timeout_s: float) -> None:
        """Give the writer so much time for what waits, then end it; what it has not written by then
        counts as dropped."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline_s - time.monotonic(), 0.0))
            _end(process)
        self._thread.join()

    # ---- the channel's thread ------------------------------------------------------------------

    def _run(self) -> None:
        process = self._start()
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError):
                self._send_all(process)
            with contextlib.suppress(OSError):
                process.stdin.close()
            code = process.wait()
            process.stdout.close()
            if not self._closing:
                log.warning(
                    "the writer %r ended (exit code %d); what it would write is dropped and "
                    "counted, and nothing else changes",
                    self.name,
                    code,
                )
        self._drop_the_rest()

    def _start(self) -> subprocess.Popen[bytes] | None:
        paths = [path or os.getcwd() for path in sys.path]
        try:
            self._process = subprocess.Popen(
                self._command,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            log.warning(
                "the writer %r cannot be started (%s); nothing is reported", self.name, error
            )
            return None
        return self._process

    def _send_all(self, process: subprocess.Popen[bytes]) -> None:
        """Until told to close and all is written, or the process ends."""
        if not self._exchange(process, msgspec.json.encode(self._greeting)):
            return
        while (record := self._next()) is not None:
            answer = self._exchange(process, msgspec.json.encode(record))
            with self._changed:
                self._counts[answer or "dropped"] += 1
            if answer is None:
                return

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> str | None:
        """``written`` or ``failed``, as the process says; ``None`` once it has ended."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
        except OSError:
            return None
        answer = process.stdout.readline().strip()
        return None if not answer else "written" if answer == b"written" else "failed"

    def _next(self) -> Record | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting.popleft() if self._waiting else None

    def _drop_the_rest(self) -> None:
        """No more is written: count what waits, and what still comes."""
        with self._changed:
            self._counts["dropped"] += len(self._waiting)
            self._waiting.clear()
            self._most = 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a writer's process with all that it has started. Its session has its number."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
