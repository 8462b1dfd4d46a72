"""Servers that end with the process that started them, however that ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence


def bound(arguments: Sequence[str], number: signal.Signals = signal.SIGKILL) -> list[str]:
    """Arguments that run a program which, on Linux, gets a signal when the thread that started it
    ends: a killed demo or test leaves no server behind. The process keeps its id.

    Args:
        arguments: of the program; the first is its path.
        number: the signal.
    """
    if sys.platform != "linux":
        return list(arguments)
    pr_set_pdeathsig = 1
    code = (
        "import ctypes, os, sys; "
        f"ctypes.CDLL(None).prctl({pr_set_pdeathsig}, {int(number)}); "
        f"os.getppid() == {os.getpid()} or sys.exit('whoever started this was killed'); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-IS", "-c", code, *arguments]
