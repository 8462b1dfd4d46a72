"""The benchmark of reports counts what processes take, and tells what exceeds its bound."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.reports import events, processor_s, rows_of, shares

SPIN = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"


def test_processor_time_is_that_of_all_processes_of_a_session():
    command = [sys.executable, "-c", SPIN]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        assert processor_s(child.pid) >= 0.25
        assert processor_s(os.getsid(0) + 10**7) == 0.0
        child.stdin.write(b"\n")


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
