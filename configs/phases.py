"""Where the seconds of a start go: each part is logged as ``what in 1.23 s``, which
``benchmarks/start.py`` reads. Imports nothing that takes time."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def timed(what: str, announced: str | None = None) -> Iterator[None]:
    """Log how long a part of start-up took; work that is still running on the device counts towards
    the next part.

    Args:
        announced: logged at the beginning of a part that may take long.
    """
    if announced:
        log.info("%s ...", announced)
    started_s = time.perf_counter()
    yield
    took(what, time.perf_counter() - started_s)


def took(what: str, seconds: float) -> None:
    """Log how long something took."""
    log.info("%s in %.2f s", what, seconds)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's garbage collector, which would traverse the objects of all that was imported
    again and again: importing torch takes a sixth less time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def seconds_of_life() -> float | None:
    """Time since this process began; ``None`` where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return up_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")
