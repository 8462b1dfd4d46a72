"""Lets the publisher of a version see who reads it: each reader holds a shared lock on its folder.

A hint, not a guard: what a reader gets is checked by its digest, whatever happens to the version
meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

COMES_WITHIN_S = 0.2
"""Within this time of a notice, a server has begun to read, or will not."""
LONGEST_S = 2.0
"""Longest time that a publisher waits for readers."""
_LOOK_S = 0.005


@contextlib.contextmanager
def read_lock(path: Path) -> Iterator[None]:
    """Be seen as a reader of a folder or file; not seen, should it be gone or the lock fail."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            # Waits for nobody. It can fail in the microseconds in which a publisher looks.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def is_read(path: Path) -> bool:
    """Whether somebody holds ``read_lock``; ``False`` if the path is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def wait_for_readers(path: Path) -> None:
    """Wait until somebody has read a folder and nobody does any more, but not long: until
    ``COMES_WITHIN_S`` for the first reader."""
    began_s, was_read = time.monotonic(), False
    while (waited_s := time.monotonic() - began_s) < LONGEST_S:
        if is_read(path):
            was_read = True
        elif was_read or waited_s >= COMES_WITHIN_S:
            return
        time.sleep(_LOOK_S)
