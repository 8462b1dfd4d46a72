"""Kernels are compiled before the programs that launch them are made, and read from the disk at the
next start. The kernels are real ones, for an H100; see ``captured_kernels``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

NUM_LAUNCHES = 8
"""Of four programs: each searches parts of rows, and joins what it finds."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "tests.serving.engine.captured_kernels", folder]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def starts(found):
    return found["starts"]


def test_a_first_start_looks_through_all_programs_and_lets_workers_compile(starts):
    first, work = starts["first"], starts["first"]["work"]
    assert first["calls"] == ["begin", *["look"] * 4, *["record"] * 4]
    assert work["num_compiled"] == work["num_by_workers"] == first["loaded"] == 4
    assert work["num_read"] == 4, "this process looks kernels up where workers put them"
    assert first["compiled_late"] == 0, "a server that answers requests does not compile"
    assert first["launched"] == NUM_LAUNCHES


def test_a_disk_that_has_other_kernels_is_asked_for_one_first(starts):
    other, work = starts["other"], starts["other"]["work"]
    assert other["calls"] == ["begin", "record", *["look"] * 4, *["record"] * 4]
    assert work["num_compiled"] == 4 and work["num_by_workers"] == 3
    assert other["launched"] == NUM_LAUNCHES


def test_a_second_start_reads_all_kernels_and_records_each_program_once(starts):
    second = starts["second"]
    assert second["calls"] == ["begin", *["record"] * 4]
    assert (second["work"]["num_compiled"], second["work"]["num_read"]) == (0, 4)
    assert second["launched"] == NUM_LAUNCHES


@pytest.mark.parametrize("which", ["edited", "damaged"])
def test_a_list_of_other_kernels_is_passed_over(starts, which):
    found = starts[which]
    assert "look" not in found["calls"], "the disk has them"
    assert found["calls"].count("record") > 4, "what a program needs is found by recording it"
    assert found["work"]["num_read"] == 4 and found["launched"] == NUM_LAUNCHES
    assert ("cannot be made beforehand" in found["log"]) == (which == "damaged")


def test_a_device_that_refuses_is_given_programs_that_have_run(starts):
    found = starts["breaks"]
    assert found["calls"][-8:] == ["run", "record"] * 4
    assert found["launched"] == NUM_LAUNCHES
    assert "cannot be recorded before it has run; each program is run before" in found["log"]


def test_what_one_process_compiles_another_finds(found):
    before, after = found["keys"]
    assert before == after, "Triton's key of a kernel depends on which keys were computed before"


def test_kernels_are_compiled_without_workers_if_these_die(found):
    assert found["killed"] == [2, 0]
    assert "one after another, because workers failed: BrokenProcessPool" in found["killed_log"]
