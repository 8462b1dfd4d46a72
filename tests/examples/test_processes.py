"""A dead child is reported with its reason, and no child outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.processes import Child, ChildDiedError, check_alive, start, stop
from oracles.support import REPOSITORY

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(100)"
)
POLITE = "import time; print('up', flush=True); time.sleep(100)"


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    stop(started, patience_s=0.1)


def wait_until(condition, limit_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def started(children: list[Child], code: str, folder: Path) -> Child:
    child = start("helper", ["-c", code], folder / "logs" / "helper.log")
    children.append(child)
    wait_until(lambda: "up" in child.log.read_text() or child.process.poll() is not None)
    return child


def is_running(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_stop_ends_a_child_that_listens(children: list[Child], tmp_path: Path):
    child = started(children, POLITE, tmp_path)
    check_alive([child])

    stop([child])

    assert child.process.returncode == -signal.SIGTERM


def test_stop_kills_a_child_that_does_not_listen(children: list[Child], tmp_path: Path):
    child = started(children, STUBBORN, tmp_path)

    stop([child], patience_s=0.2)

    assert child.process.returncode == -signal.SIGKILL


def test_stop_also_ends_what_the_child_started(children: list[Child], tmp_path: Path):
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(100)']); print(p.pid, 'up', flush=True); p.wait()"
    )
    child = started(children, code, tmp_path)
    grandchild = int(child.log.read_text().split()[0])

    stop([child])

    wait_until(lambda: not is_running(grandchild))


def test_a_dead_child_is_reported_with_the_end_of_its_log(children: list[Child], tmp_path: Path):
    child = started(children, "print('x\\n' * 100 + 'the reason'); raise SystemExit(3)", tmp_path)
    child.process.wait()

    with pytest.raises(ChildDiedError) as caught:
        check_alive([child])

    text = str(caught.value)
    assert f"the helper (process {child.process.pid}) ended with exit code 3" in text
    assert str(child.log) in text
    assert text.endswith("the reason")
    assert len(text.splitlines()) < 30


def test_a_killed_child_is_reported_with_its_signal(children: list[Child], tmp_path: Path):
    child = started(children, POLITE, tmp_path)
    child.process.kill()
    child.process.wait()

    with pytest.raises(ChildDiedError, match="was killed by SIGKILL; the system may be out of"):
        check_alive([child])


def test_stopping_twice_is_fine(children: list[Child], tmp_path: Path):
    child = started(children, POLITE, tmp_path)

    stop([child])
    stop([child])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_children_end_when_their_parent_is_killed(tmp_path: Path):
    code = (
        "import pathlib, time; from examples.processes import start\n"
        f"c = start('helper', ['-c', {POLITE!r}], pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "print(c.process.pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())

    parent.kill()
    parent.wait()

    wait_until(lambda: not is_running(child))
