"""Processes that the server starts and that end when it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""They concern the server as a whole."""


def start_python(arguments: Sequence[str], descriptors: Iterable[int]) -> subprocess.Popen[bytes]:
    """Run Python in a process that inherits descriptors, with the signals that end a server
    blocked: a terminal sends SIGINT, and a service manager SIGTERM, to all processes of a server.
    """
    paths = [path or os.getcwd() for path in sys.path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=tuple(descriptors),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
