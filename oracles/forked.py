"""Python commands in processes of their own, without importing torch for each.

A process that imports torch and transformers takes six seconds of a core before it does anything.
Tests start dozens. Here one process imports the packages that ours need (``oracles.preloaded``) and
forks for every command, which then imports our rooms from its own ``PYTHONPATH`` and runs as
``python -m ...`` or ``python -c ...`` would: with its own environment, folder, output, signals and
exit code. Linux and macOS.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from oracles.support import REPOSITORY


class Forked:
    """A running command, with the methods of ``subprocess.Popen`` that tests need."""

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        stdout: Path,
        stderr: Path | None = None,
    ) -> None:
        """
        Args:
            arguments: those of ``python``: ``-m MODULE ...`` or ``-c CODE ...``.
            env: the whole environment; its ``PYTHONPATH`` says where our rooms are.
            stdout: file that receives standard output.
            stderr: file that receives standard error; ``None``: ``stdout``, too.
        """
        self.args = tuple(arguments)
        files = str(stdout), str(stderr or stdout)
        for file in files:
            Path(file).touch()
        self._process = context().Process(
            target=_become, args=(self.args, dict(env), str(cwd), *files), daemon=False
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, minus the signal that ended it; ``None`` while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """See ``returncode``."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        self._process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run_forked(
    arguments: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; the arguments are those of ``Forked``.

    Raises:
        subprocess.TimeoutExpired: it ran for ``timeout`` seconds, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = Forked(arguments, env, cwd, out, err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(
            list(arguments), code, out.read_text(), err.read_text(errors="replace")
        )


@cache
def context() -> ForkServerContext:
    """The process that forks, for a test that starts functions by itself. A test process has one,
    so nobody else may start it with other imports. It lives as long as this one."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["oracles.preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return found


def _become(
    arguments: tuple[str, ...], env: dict[str, str], cwd: str, stdout: str, stderr: str
) -> None:
    """Turn a forked process into ``python arguments``."""
    for descriptor, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    own = {str(REPOSITORY), str(REPOSITORY / "kernels"), "", os.getcwd()}
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [cwd, *paths, *(path for path in sys.path if path not in own)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "oracles"]:
        del sys.modules[name]
    how, what, *rest = arguments
    sys.argv[:] = [what if how == "-m" else how, *rest]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
