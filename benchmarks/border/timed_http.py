"""An HTTP process that notes the processor time of each turn of its event loop.

    python -P -m benchmarks.border.timed_http FILE DESCRIPTOR... NUM_ROWS ROW

For as long as a turn takes, all streams of the process wait; and it does not depend on what else
the machine does.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from serving.border.http_process import main

ROOM = 1 << 20
"""Turns that a file holds; later ones are not noted."""


def make(path: Path) -> None:
    """A file for ``note_turns``: the number of turns, then microseconds of each."""
    np.zeros(ROOM + 1).tofile(path)


def turns_us(path: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What has been noted so far."""
    found = np.memmap(path, np.float64, "r")
    return np.array(found[1 : 1 + int(found[0])])


def num_turns(path: Path) -> int:
    """How many have been noted so far."""
    return int(np.memmap(path, np.float64, "r", shape=(1,))[0])


def note_turns(path: Path) -> None:
    """Let event loops of this process note their turns."""
    noted = np.memmap(path, np.float64, "r+")
    loop_type: Any = asyncio.SelectorEventLoop
    run_once = loop_type._run_once
    count = 0

    def timed(loop: Any) -> None:
        nonlocal count
        begun_ns = time.thread_time_ns()
        run_once(loop)
        if count < ROOM:
            count += 1
            noted[count] = (time.thread_time_ns() - begun_ns) / 1e3
            noted[0] = count

    loop_type._run_once = timed


if __name__ == "__main__":
    note_turns(Path(sys.argv[1]))
    main(*map(int, sys.argv[2:]))
