"""Processes that measure together say where they are, and where they are stuck."""

from __future__ import annotations

import time

import pytest

from benchmarks.harness.processes import StuckError, Voice, run_all


def answer(voice: Voice) -> int:
    voice.at("begins")
    return 41 + voice.rank


def be_silent(voice: Voice) -> None:
    voice.at("waits")
    time.sleep(1.5)


def wait_for_nobody(voice: Voice) -> None:
    time.sleep(60)


def fail(voice: Voice) -> None:
    raise ValueError("no such card")


def test_the_first_process_answers(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_all([answer, answer], wait_s=60, dump_after_s=None) == 41
    assert "process 0: begins" in capfd.readouterr().out


def test_stacks_of_all_are_printed_when_nobody_says_anything(
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_all([be_silent, be_silent], wait_s=60, dump_after_s=0.5)

    said = capfd.readouterr()
    assert "in be_silent" in said.err
    assert "nobody has said anything for" in said.out


def test_a_process_that_fails_ends_all_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    began_s = time.monotonic()
    with pytest.raises(StuckError, match="process 1 ended with exit code 1"):
        run_all([wait_for_nobody, fail], wait_s=60, dump_after_s=None)

    assert time.monotonic() - began_s < 50
    assert "ValueError: no such card" in capfd.readouterr().err
