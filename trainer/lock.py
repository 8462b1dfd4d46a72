"""Only one trainer runs in a run folder, and who that is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from buffer.files import OWNER_FOLDER, open_regular, read_regular

_PATIENCE_S = 0.5
"""Seconds to wait for the lock: ``owner_of`` takes it for a moment."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds the lock."""

    pid: int | None
    """``None``: it has not written it yet."""
    host: str


@contextlib.contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Hold ``folder/lock``; the system releases it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
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
