from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from oracles.forked import Forked, run_forked

SAY = (
    "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ.get('SAID')); "
    "print('to stderr', file=sys.stderr); sys.exit(3)"
)


def test_it_runs_as_python_would(tmp_path: Path):
    env = {"PATH": os.environ["PATH"], "SAID": "hello"}
    done = run_forked(["-c", SAY, "one", "two"], env, tmp_path, timeout=60)

    assert done.returncode == 3
    assert done.stdout == f"['one', 'two'] {tmp_path} hello\n"
    assert done.stderr == "to stderr\n"


def test_modules_come_from_its_own_path_and_an_error_is_a_traceback(tmp_path: Path):
    package = tmp_path / "buffer"
    package.mkdir()
    (package / "__init__.py").write_text("print('another buffer')\n")
    (package / "__main__.py").write_text("raise LookupError('no such thing')\n")

    done = run_forked(["-m", "buffer"], {"PYTHONPATH": str(tmp_path)}, Path("/"), timeout=60)

    assert done.returncode == 1
    assert done.stdout == "another buffer\n"
    assert "LookupError: no such thing" in done.stderr


def test_signals_end_it(tmp_path: Path):
    wait = "import time; print('here'); time.sleep(60)"
    out = tmp_path / "out"
    process = Forked(["-c", wait], {}, tmp_path, out)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    assert process.poll() is None
    while out.read_text() != "here\n":
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM
    process.kill()  # has ended; nothing happens
