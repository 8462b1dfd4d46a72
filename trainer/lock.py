"""Only one trainer runs in a run folder, and who that is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from buffer.files import OWNER_FOLDER, leads_to, open_regular, read_regular

STOP_SIGNAL = signal.SIGUSR1
"""What ``trainer stop`` sends. Not SIGTERM: a second one ends the trainer without a checkpoint, so
that two people who stop a run, or one who is impatient, would lose what was learnt."""
_PATIENCE_S = 0.5
"""Seconds to wait for the lock: ``owner_of`` takes it for a moment."""
_LOOK_EVERY_S = 0.25
"""Seconds between two looks whether the lock is still at its path."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds the lock."""

    pid: int | None
    """``None``: it has not written it yet."""
    host: str


class RunGoneError(OSError):
    """The run folder is no longer where the trainer found it, or no longer its own."""


class RunLock:
    """A held ``lock``, and whether it is still the one at its path."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """
        Raises:
            ValueError: another process holds it.
        """
        self._folder = folder
        self._stack = stack
        self._path = folder / "lock"
        self._looked_s = time.monotonic()
        self._take()

    def check(self, at_once: bool = False) -> None:
        """Look whether a trainer that starts now in the run folder would meet this lock. Where
        somebody deleted the folder, it is made again, with a lock.

        Args:
            at_once: do not leave it at what was seen in the last ``_LOOK_EVERY_S``.

        Raises:
            RunGoneError: the folder was moved, or another trainer has taken its place.
        """
        now_s = time.monotonic()
        if not at_once and now_s - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        if leads_to(self._path, self._descriptor):
            return
        run = self._folder.parent
        if os.fstat(self._descriptor).st_nlink:
            raise RunGoneError(
                f"{run} was moved while its trainer worked, which would go on writing to the old "
                f"place; ending. Nothing acknowledged is lost: started again with run_dir set to "
                f"the new place, the trainer resumes from its last checkpoint"
            )
        try:
            self._take()
        except ValueError as error:
            raise RunGoneError(f"{run} was deleted while its trainer worked: {error}") from None

    def _take(self) -> None:
        self._stack.enter_context(_held(self._folder))
        self._descriptor = open_regular(self._path)
        self._stack.callback(os.close, self._descriptor)


@contextlib.contextmanager
def only_trainer(folder: Path) -> Iterator[RunLock]:
    """Hold ``folder/lock``; the system releases it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    with contextlib.ExitStack() as stack:
        yield RunLock(folder, stack)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    folder.mkdir(mode=OWNER_FOLDER, parents=True, exist_ok=True)
    path = folder / "lock"
    # No fallback to a lock that is a mere file: a killed trainer would leave it behind.
    try:
        holding = FileLock(path, timeout=_PATIENCE_S, fallback_to_soft=False).acquire()
    except Timeout:
        owner = (
            read_regular(path, 300).decode(errors="replace").partition("\n")[0][:32].strip()
            or "unknown"
        )
        raise ValueError(
            f"another trainer (process {owner}) works in {folder}; not starting. Stop it first, or "
            f"choose another run_dir"
        ) from None
    with holding:
        path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
        yield


def owner_of(folder: Path) -> Owner | None:
    """The trainer that works in this folder; ``None`` if none does. What a killed one wrote does
    not count: the system has released its lock."""
    path = folder / "lock"
    try:
        with open(open_regular(path), errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, _, host = file.read(300).partition("\n")
                return Owner(int(pid) if pid.isdigit() else None, host.strip())
    except FileNotFoundError:
        return None
    return None
