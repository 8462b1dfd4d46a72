"""The benchmark of reports counts what processes take, and tells what exceeds its bound."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.reports import events, processor_s, rows_of, shares

SPIN = """
import subprocess, sys, time
spin = "import time\\nwhile time.process_time() < 0.3: pass\\nprint(flush=True)\\ninput()"
child = subprocess.Popen([sys.executable, "-c", spin], start_new_session=True, stdin=0)
child.wait()
"""


def test_processor_time_is_that_of_all_descendants_whatever_their_sessions():
    with subprocess.Popen(
        [sys.executable, "-c", SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        parent.stdout.readline()  # the child has spun
        assert processor_s(parent.pid) >= 0.3
        parent.stdin.write(b"\n")
    assert processor_s(10**8) == 0.0


def test_shares_are_at_the_rates_of_a_server_and_a_trainer():
    each = {"own_ms": 1.0, "writer_ms": 2.0, "writer_idle_percent": 0.1}

    found = shares({"server": each, "trainer": dict.fromkeys(events(), each)})

    assert found["server_process"] == pytest.approx(0.1 / 5)
    assert found["server_writer"] == pytest.approx(0.2 / 5 + 0.1)
    per_s = 1 / 5 + 1 / 5 + 1 / 20
    assert found["trainer_process"] == pytest.approx(0.1 * per_s)
    assert found["trainer_writer"] == pytest.approx(0.2 * per_s + 0.1)


def test_what_takes_too_much_or_is_not_found_fails():
    percent = {"server_process": 0.1, "server_writer": 0.1, "trainer_process": 0.3,
               "trainer_writer": 0.3}  # fmt: skip
    found = {"writers": {"wandb": {"percent": percent}}, "demo": {"wanted": 40, "found": 39}}

    assert [row.holds for row in rows_of(found)] == [True, True, True, False, False]
