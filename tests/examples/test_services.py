"""A service that the demo starts holds traces and weights, and ends with it."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from buffer.backends import open_backend
from buffer.interface import ServiceAwayError, TraceLimits
from examples.services import BUFFER, SERVICES, buffer_url
from oracles.support import REPOSITORY

LIMITS = TraceLimits(segment_bytes=4096, max_bytes=1 << 20, ttl_s=3600.0, sync_interval_s=0.0)


@pytest.mark.parametrize("name", list(SERVICES))
def test_a_service_takes_traces_while_the_demo_runs_and_not_after(name: str, tmp_path: Path):
    with buffer_url(name, tmp_path) as url:
        backend = open_backend(url, tmp_path)
        with backend.open_trace_writer(LIMITS) as writer:
            writer.append(b"a trace")
        (record,) = backend.open_record_reader().read(10)
        assert bytes(record.payload) == b"a trace"
        assert backend.open_weights().versions() == []
    assert stat.S_IMODE((tmp_path / BUFFER).stat().st_mode) == 0o700
    with pytest.raises(ServiceAwayError):
        open_backend(url, tmp_path).stats()


HOLD = """
import sys, time
from pathlib import Path
from examples.services import buffer_url
with buffer_url(sys.argv[1], Path(sys.argv[2])) as url:
    print(url, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(
    ("name", "number"),
    [("redis", signal.SIGTERM), ("redis", signal.SIGKILL), ("kafka", signal.SIGKILL)],
)
def test_a_service_ends_with_a_demo_that_is_killed(
    name: str, number: signal.Signals, tmp_path: Path
):
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, name, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None and demo.stdout.readline()
        [service] = children_of(demo.pid)
        demo.send_signal(number)
    deadline = time.monotonic() + 60
    while is_running(service):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """Processes that this one has started and that run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(status.read_text().rpartition(") ")[2].split()[1])
            found += [int(status.parent.name)] if parent == pid else []
    return found


def is_running(pid: int) -> bool:
    """It is there, and no zombie that only waits to be asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_the_log_needs_no_service(tmp_path: Path):
    with buffer_url("log", tmp_path) as url:
        assert url == "log:"
    assert list(tmp_path.iterdir()) == []
