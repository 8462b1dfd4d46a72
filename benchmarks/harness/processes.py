"""Processes that measure something together, and say where they are.

Every process says what it begins, with the seconds since all were started. If nobody has said
anything for some time, all print the stacks of their threads: that tells which of them waits for
which.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.harness.results import say

_POLL_S = 0.2
_DUMP_S = 1.0
"""For which stacks of all are awaited, so that they do not mix."""
Work = Callable[["Voice"], Any]


@dataclass(frozen=True, slots=True)
class Voice:
    """How a process says where it is."""

    rank: int
    began_s: float
    """``time.monotonic``, which all processes of a host share."""
    connection: Connection

    def at(self, what: str) -> None:
        """Something is reached."""
        self.connection.send(("at", f"{self.seconds:6.1f} s  process {self.rank}: {what}"))

    @property
    def seconds(self) -> float:
        """Since all were started."""
        return time.monotonic() - self.began_s


class StuckError(RuntimeError):
    """The processes did not end as they should."""


def run_all(works: Sequence[Work], wait_s: float, dump_after_s: float | None) -> Any:
    """Run each of these in a process of its own, which must be able to import them, and return what
    the first one returns.

    Args:
        works: what they say by ``Voice.at``, and by log records, is printed.
        wait_s: for which to wait for all of it.
        dump_after_s: of silence, after which all print their stacks, once for each silence;
            ``None``: never.

    Raises:
        StuckError: one died, or there was no answer in time. All have been killed.
    """
    context = multiprocessing.get_context("spawn")
    began_s = time.monotonic()
    processes, theirs = [], list[Connection]()
    for rank, work in enumerate(works):
        ours, other = context.Pipe(duplex=False)
        processes.append(
            context.Process(target=_be_process, args=(work, rank, began_s, other), daemon=True)
        )
        theirs.append(ours)
        processes[-1].start()
        other.close()
    hearing = _Hearing(processes, theirs, began_s + wait_s, dump_after_s)
    try:
        answer = hearing.answer()
        for process in processes:
            process.join(30)
        return answer
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


class _Hearing:
    """What the processes say, until the first has an answer."""

    def __init__(
        self, processes: Sequence[Any], pipes: Sequence[Connection], end_s: float,
        dump_after_s: float | None,
    ) -> None:  # fmt: skip
        self._processes, self._pipes = processes, {pipe: n for n, pipe in enumerate(pipes)}
        self._heard = set[int]()
        """Ranks of those that have said anything: before that, a signal would kill them."""
        self._end_s, self._dump_after_s = end_s, dump_after_s
        self._heard_s, self._has_dumped = time.monotonic(), False

    def answer(self) -> Any:
        while True:
            for pipe in wait(list(self._pipes), _POLL_S):
                assert isinstance(pipe, Connection)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    del self._pipes[pipe]
                    continue
                self._heard.add(self._pipes[pipe])
                if kind == "answer":
                    return value
                self._heard_s, self._has_dumped = time.monotonic(), False
                say(value)
            self._check()

    def _check(self) -> None:
        """
        Raises:
            StuckError: it is no use to wait any longer.
        """
        now_s = time.monotonic()
        for rank, process in enumerate(self._processes):
            if process.exitcode:
                time.sleep(_POLL_S)  # what it printed comes first
                self._dump()
                raise StuckError(f"process {rank} ended with exit code {process.exitcode}")
        if not self._pipes:
            raise StuckError("all processes ended without an answer")
        if now_s > self._end_s:
            self._dump()
            raise StuckError("no answer in time")
        silent_s = now_s - self._heard_s
        if self._dump_after_s is not None and silent_s > self._dump_after_s:
            if not self._has_dumped:
                say(f"nobody has said anything for {silent_s:.0f} s; where all are:")
                self._dump()
            self._has_dumped = True

    def _dump(self) -> None:
        """Let each process print its stacks, one after the other."""
        if self._dump_after_s is None:
            return
        for rank, process in enumerate(self._processes):
            if process.is_alive() and rank not in self._heard:
                say(f"process {rank} (pid {process.pid}) is still importing")
            elif process.is_alive():
                say(f"stacks of process {rank} (pid {process.pid}):")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGUSR1)
                process.join(_DUMP_S / len(self._processes))


class _Aloud(logging.Handler):
    """Log records, as a process says them."""

    def __init__(self, voice: Voice) -> None:
        super().__init__(logging.INFO)
        self._voice = voice

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._voice.at(record.getMessage())


def _be_process(work: Work, rank: int, began_s: float, connection: Connection) -> None:
    """The process itself. It does not wait for others as it dies."""
    # Written by C code, so they come also where the interpreter waits for a library.
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    voice = Voice(rank, began_s, connection)
    voice.at("has imported what it needs")
    logging.basicConfig(level=logging.INFO, handlers=[_Aloud(voice)], force=True)
    try:
        found = work(voice)
        if rank == 0:
            connection.send(("answer", found))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
