"""Starts HTTP processes, and starts them again when they die.

A process that dies, however it dies, ends its own clients' connections and nothing else: its
``Line`` cancels its requests, the others go on, and connections that nobody has accepted wait in
the listener's queue. The server gives up once processes die at once, again and again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from serving.border.engine_side import Line
from serving.border.in_process import Desk
from serving.border.messages import Welcome
from serving.http.metrics import NUM_TALLIES, Metrics
from serving.http.tallies import Tallies, shared_memory
from serving.python_process import ending, start_python

log = logging.getLogger(__name__)

_LIVED_S = 1.0
"""A process that has accepted connections for so long did not die at once."""
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
SILENT_S = 20.0
"""A process that is not heard of for so long is stopped, or its event loop is stuck."""
_OWN_STALL_S = 1.0
"""After a pause of this process for so long, the others may have been heard of without notice."""
MOST_DEATHS = 6
"""Processes that may die at once in a row. Starting them takes some ten seconds."""


@dataclass(slots=True)
class _Running:
    """One process that lives, or whose end is not noticed yet."""

    process: subprocess.Popen[bytes]
    line: Line
    ready_s: float | None = None
    """When it was seen to be ready; monotonic clock."""


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process that imports what it needs and waits to be greeted."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    """This side of the connection to it."""


class Spawner:
    """Makes the HTTP processes of a server. The first ones are made at once, so that they import
    while the model loads."""

    def __init__(self, count: int, listener: socket.socket) -> None:
        """
        Args:
            count: how many HTTP processes the server has.
            listener: they accept connections from it; it stays open.
        """
        self.count = count
        self._listener = listener
        self._num_rows = count + 1
        self._tallies = shared_memory(self._num_rows, NUM_TALLIES)
        """Its last row is that of this process."""
        self._early = {row: self._new(row) for row in range(count)}

    def spawn(self, row: int) -> Spawned:
        """A process for this row of the tallies, which no other one may have any more."""
        return self._early.pop(row, None) or self._new(row)

    def tallies(self) -> Tallies:
        """Numbers of this process beside those of the others."""
        return Tallies.mapped(self._tallies, self._num_rows, self.count)

    def close(self) -> None:
        """End the processes that nobody took."""
        for spawned in self._early.values():
            spawned.process.kill()
            spawned.process.wait()
            spawned.sock.close()
        self._early.clear()
        os.close(self._tallies)

    def _new(self, row: int) -> Spawned:
        own, other = socket.socketpair()
        with other:
            descriptors = self._listener.fileno(), other.fileno(), self._tallies
            numbers = *descriptors, self._num_rows, row
            process = start_python([*COMMAND, *map(str, numbers)], descriptors)
        log.debug("HTTP process %d started", process.pid)
        return Spawned(process, own)


class HttpProcesses:
    """The HTTP processes of a server that is ready. All methods are for one thread."""

    def __init__(self, spawner: Spawner, desk: Desk, welcome: Welcome) -> None:
        self._spawner = spawner
        self._desk = desk
        self._welcome = welcome
        self._metrics = Metrics(desk.model.model_name, spawner.tallies())
        self._slowly = ThreadPoolExecutor(max_workers=2, thread_name_prefix="orders")
        self._running: list[_Running | None] = [None] * spawner.count
        self._start_s = [0.0] * spawner.count
        """Not to be started before; monotonic clock."""
        self._num_deaths = 0
        """Deaths at once since the last process that was of use."""
        self._own_deaths = [0] * spawner.count
        """The same, of the processes of one row: one that is of use does not help another."""
        self._silence = _Silence(SILENT_S)

    @property
    def pids(self) -> list[int]:
        """Of the processes that accept connections."""
        return [one.process.pid for one in self._living() if one.line.is_ready]

    @property
    def is_ready(self) -> bool:
        """At least one accepts connections."""
        return bool(self.pids)

    def tick(self) -> str | None:
        """Start what is not running. Returns why there is no sense in going on, if so."""
        self._silence.end(self._living())
        for row, running in enumerate(self._running):
            if running is None:
                if time.monotonic() >= self._start_s[row]:
                    self._running[row] = self._start(row)
            elif _is_over(running):
                self._bury(row, running)
                if self._num_deaths >= MOST_DEATHS:
                    return (
                        f"{self._num_deaths} HTTP processes in a row died as soon as they were "
                        f"started; what they wrote to this log says why"
                    )
            elif running.line.is_ready:
                self._note_ready(row, running)
        return None

    def close(self, left_s: float, is_forced: Callable[[], bool]) -> None:
        """Let all of them finish their responses and end.

        Args:
            left_s: time for that.
            is_forced: becomes true if nobody is to be waited for any more.
        """
        for one in self._living():
            one.line.close_http(left_s)
        deadline_s = time.monotonic() + left_s + 1
        while self._living() and time.monotonic() < deadline_s and not is_forced():
            time.sleep(0.02)
            self._silence.end(self._living())
            for row, running in enumerate(self._running):
                if running is not None and _is_over(running):
                    self._end(row, running)
        for row, running in enumerate(self._running):
            if running is not None:
                self._end(row, running)
        self._slowly.shutdown(wait=False, cancel_futures=True)

    def _living(self) -> list[_Running]:
        return [one for one in self._running if one is not None]

    def _note_ready(self, row: int, running: _Running) -> None:
        now_s = time.monotonic()
        if running.ready_s is None:
            running.ready_s = now_s
            log.info("HTTP process %d accepts connections", running.process.pid)
        elif now_s - running.ready_s > _LIVED_S:
            self._num_deaths = self._own_deaths[row] = 0

    def _start(self, row: int) -> _Running:
        spawned = self._spawner.spawn(row)
        line = Line(spawned.sock, self._desk, self._welcome, self._slowly)
        line.start()
        return _Running(spawned.process, line)

    def _bury(self, row: int, running: _Running) -> None:
        """Clear up after a process that died or does not answer, and plan for the next one."""
        lived_s = 0.0 if running.ready_s is None else time.monotonic() - running.ready_s
        if lived_s > _LIVED_S:
            self._num_deaths = self._own_deaths[row] = 0
        else:
            self._num_deaths += 1
            self._own_deaths[row] += 1
        self._end(row, running)
        pause_s = 0.0
        if deaths := self._own_deaths[row]:
            pause_s = min(_FIRST_PAUSE_S * 2 ** (deaths - 1), _LONGEST_PAUSE_S)
        self._start_s[row] = time.monotonic() + pause_s
        problem = running.line.problem
        log.error(
            "HTTP process %d %s%s; its requests are cancelled, and another one is started",
            running.process.pid,
            ending(running.process.returncode),
            f" ({problem})" if problem else "",
        )

    def _end(self, row: int, running: _Running) -> None:
        """Make sure that a process has ended, and its requests."""
        if running.line.is_over and running.line.problem is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(1.0)  # for its own exit code
        running.process.kill()
        running.process.wait()
        running.line.end()
        for _ in range(running.line.num_cancelled):  # the process itself cannot count them any more
            self._metrics.count_finished("cancelled")
        self._running[row] = None


class _Silence:
    """Ends the connections of processes that are not heard of any more."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._looked_s = time.monotonic()
        self._since_s = self._looked_s
        """What happened before does not count."""

    def end(self, living: Iterable[_Running]) -> None:
        """Look for silent processes. To be called several times a second."""
        now_s = time.monotonic()
        if now_s - self._looked_s > _OWN_STALL_S:
            self._since_s = now_s
        self._looked_s = now_s
        for one in living:
            silent_s = now_s - max(one.line.heard_s, self._since_s)
            if one.line.is_ready and silent_s > self._longest_s and not one.line.is_over:
                one.line.give_up(f"it was not heard of for {silent_s:.0f} s")


def _is_over(running: _Running) -> bool:
    return running.process.poll() is not None or running.line.is_over


COMMAND = ["-P", "-m", "serving.border"]
"""Arguments of Python for an HTTP process, before the numbers of what it inherits."""
