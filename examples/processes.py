"""Child processes with a log file, a check that they live, and an orderly end."""

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
"""Time to exit after SIGTERM: a server may drain for 30 s, a trainer writes its checkpoint."""
TAIL_LINES = 25


class ChildDiedError(Exception):
    """A process ended by itself. The text names it, says how it ended and quotes its last lines."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process that leads its own group, so that Ctrl-C at the terminal does not reach it."""

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
                f"the {child.name} (process {child.process.pid}) {_ending(code)}; the last lines "
                f"of {child.log}:\n{tail(child.log)}"
            )


def stop(children: Sequence[Child], patience_s: float = PATIENCE_S) -> None:
    """Send SIGTERM to all, wait, and kill those that did not end.

    Ctrl-C while waiting kills them at once.
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
    """The last lines of a log, quoted."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  | {line}" for line in lines[-num_lines:]) or "  | (it is empty)"


def _ending(code: int) -> str:
    """How a process ended, from ``Popen.returncode``."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = "; the system may be out of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _signal(child: Child, number: signal.Signals) -> None:
    """Signal the whole group of a child that has not ended."""
    if child.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, number)


def _die_with_parent() -> list[str]:
    """Python arguments that make the process get SIGTERM when its parent dies, and then exec the
    program that follows them; the setting survives exec."""
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
