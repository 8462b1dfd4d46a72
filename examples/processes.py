"""Child processes that are logged, watched, and always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 45.0
"""A server may drain for 30 s, a trainer writes its checkpoint."""
TAIL_LINES = 25


class ChildDiedError(Exception):
    """A process ended by itself; the text has the end of its log."""


@dataclass(frozen=True, slots=True)
class Child:
    """One process, leader of its own group, so that a Ctrl-C at the terminal is not its own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def start(name: str, arguments: Sequence[str], log: Path) -> Child:
    """Run ``python ARGUMENTS`` with its output in ``log``.

    On Linux the child gets SIGTERM when the process that started it is killed outright.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *_die_with_parent(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Child(name, process, log)


def check_alive(children: Iterable[Child]) -> None:
    """
    Raises:
        ChildDiedError: one of them ended.
    """
    for child in children:
        code = child.process.poll()
        if code is not None:
            raise ChildDiedError(
                f"the {child.name} ended with exit code {code}; the end of {child.log}:\n"
                f"{tail(child.log)}"
            )


def stop(children: Sequence[Child], patience_s: float = PATIENCE_S) -> None:
    """Ask all to end, wait, and kill those that will not. Those that ended already are fine.

    Ctrl-C while waiting kills at once.
    """
    for child in children:
        _signal(child, signal.SIGTERM)
    try:
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(patience_s)
    finally:
        for child in children:
            _signal(child, signal.SIGKILL)
            child.process.wait()


def tail(log: Path, num_lines: int = TAIL_LINES) -> str:
    """The last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  | {line}" for line in lines[-num_lines:])


def _signal(child: Child, number: signal.Signals) -> None:
    """Signal the whole group of a child that has not ended."""
    if child.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, number)


def _die_with_parent() -> list[str]:
    """Arguments of a Python that asks the kernel for SIGTERM at its parent's death and then becomes
    the program named after them; the wish survives exec."""
    if sys.platform != "linux":
        return []
    pr_set_pdeathsig = 1
    code = (
        "import ctypes, os, sys; "
        f"ctypes.CDLL(None).prctl({pr_set_pdeathsig}, {int(signal.SIGTERM)}); "
        f"os.getppid() == {os.getpid()} or sys.exit('the demo was killed'); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    return ["-c", code]
