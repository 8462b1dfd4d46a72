"""Processes that end when the one that started them does, however it ends."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable


def watch(lifeline: int, at_end: Callable[[], None]) -> None:
    """Call something on a thread once the process that started this one is gone.

    Args:
        lifeline: file descriptor to read from, whose other end that process holds and never writes
            to.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(lifeline, 1)
        at_end()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
