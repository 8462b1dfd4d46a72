"""Several processes of one trainer on this host, and the process that watches them.

It starts them, passes signals to the first, and ends all of them if one dies. It imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import typer

_GRACE_S = 30.0
"""Seconds that the others have to end by themselves once a process died: the first saves a
checkpoint, if it still can."""
_POLL_S = 0.1
LOOPBACK = (
    {} if sys.platform == "darwin" else {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
)
"""Environment of processes of one host: they meet there, whatever networks it has."""


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What makes a process one of ``size`` on this host."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def supervise(command: Sequence[str], size: int, environment: Mapping[str, str]) -> int:
    """Run ``size`` processes of a command to their end.

    Args:
        command: that of one process; it gets ``--lifeline`` with the number of a file descriptor
            that ends with this process.

    Returns:
        Exit code: 0 if all ended well, else that of the first process, or 1.
    """
    readable, writable = os.pipe()
    port = _free_port()
    children = [
        subprocess.Popen(
            [*command, "--lifeline", str(readable)],
            env={**LOOPBACK, **environment, **environment_of(rank, size, port)},
            pass_fds=(readable,),
            # Ctrl-C in a terminal reaches this process alone, which passes it on.
            start_new_session=True,
        )
        for rank in range(size)
    ]
    os.close(readable)
    try:
        _pass_signals(children)
        return _wait(children)
    finally:
        _end(children)
        os.close(writable)


def _pass_signals(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """The first signal stops the trainer, the second ends all of its processes."""
    was_told = threading.Event()

    def handle(number: int, _frame: object) -> None:
        for child in children if was_told.is_set() else children[:1]:
            child.send_signal(signal.SIGKILL if was_told.is_set() else signal.SIGTERM)
        was_told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [child.poll() for child in children]
        if all(code == 0 for code in codes):
            return 0
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return _report(children, failed[0])
        time.sleep(_POLL_S)


def _report(children: Sequence[subprocess.Popen[bytes]], rank: int) -> int:
    """Say which process failed, let the first save what it can, and end all."""
    child = children[rank]
    code = child.returncode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    typer.echo(
        f"process {rank} of {len(children)} of the trainer (pid {child.pid}) {how}; ending the "
        f"others. Nothing acknowledged is lost: started again, the trainer resumes from its last "
        f"checkpoint",
        err=True,
    )
    if rank != 0:
        children[0].send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(_POLL_S)
    first = children[0].poll()
    return first if first is not None and first > 0 else 1


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
