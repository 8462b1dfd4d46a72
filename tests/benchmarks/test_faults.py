"""The fault benchmarks in small: they find nothing wrong here, and something where there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import damage, fuzz, kills, network
from buffer.records import Trace
from oracles.forked import run_forked
from oracles.plain_trace import problems_of
from oracles.support import REPOSITORY


def run(module: str, out: Path, *arguments: str) -> dict:
    """Run a benchmark to its end; returns what it wrote."""
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    command = ["-m", f"benchmarks.faults.{module}", "--out", str(out), *arguments]
    done = run_forked(command, env, REPOSITORY, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_no_spoilt_record_ends_the_decoder_or_passes_for_a_trace(tmp_path):
    found = run("fuzz", tmp_path / "out.json", "--records", "3000", "--workers", "2")
    assert found["records"] == 3000
    assert sum(found["outcomes"].values()) == 3000
    assert {"header", "schema", "version", "content", "accepted"} == set(found["outcomes"])
    assert 0 <= found["grown_mib"] < fuzz.MEMORY_MIB


@pytest.mark.parametrize(
    ("column", "value"),
    [("token_ids", -1), ("counts", -5), ("reals", 7.0), ("p_logp", 0.5), ("rows", 1e12)],
)
def test_the_plain_definition_notices_what_the_decoder_must(column, value):
    sound = fuzz.decode_traces(fuzz.sound_records())[8]  # float32 rows, six rounds
    assert isinstance(sound, Trace)
    assert problems_of(sound) == []
    owner = {"token_ids": sound, "rows": sound.features}.get(column, sound.rounds)
    getattr(owner, column).reshape(-1)[0] = value
    assert problems_of(sound)


def test_the_fuzzer_notices_a_decoder_that_lets_something_pass(monkeypatch):
    monkeypatch.setattr("buffer.codec._check_counts", lambda rounds, num_tokens: None)
    monkeypatch.setattr("buffer.codec._check_reals", lambda rounds: None)
    assert fuzz._fuzz(0, 3000)["num_failures"] > 0


def test_changed_bits_and_cuts_of_a_segment_are_noticed_and_cost_one_trace(tmp_path):
    found = damage.damage_all(tmp_path, step=251)
    assert (found["segment_bytes"], found["num_failures"]) == (4096, 0)
    assert found["flips"] + found["cuts"] > 200


def test_damage_that_is_not_noticed_would_be_reported(tmp_path):
    segment = damage.write_segment(tmp_path)
    problem = damage.check(segment, "bit 0", segment.content, 0, tmp_path)
    assert problem is not None and "bit 0: read" in problem


@pytest.mark.timeout(300)
@pytest.mark.parametrize("buffer", ["log", "redis"])
def test_killed_processes_lose_nothing_and_teach_nothing_twice(tmp_path, buffer):
    found = run("kills", tmp_path / "out.json", "--kills", "10", "--buffers", buffer)[buffer]
    assert sum(found["kills"].values()) == 10
    assert 0 < found["acknowledged"] <= found["learnt"]
    assert (found["lost"], found["learnt_twice"]) == (0, 0)


@pytest.mark.timeout(300)
def test_a_failing_network_miscounts_nothing_and_ends(tmp_path):
    quick = ["--seconds", "1", "--fault-s", "0.5", "--after-s", "0.5", "--buffers", "redis"]
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    out = tmp_path / "out.json"
    # A process of its own: it forks before it imports torch, which a forked one has.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults.network", "--out", str(out), *quick],
        env=env, cwd=REPOSITORY, timeout=280, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["redis"]
    assert found["miscounted"] == 0
    assert found["counts"]["written"] == found["learnt"] > 0
    assert set(found["recoveries_s"]) == set(network.FAULTS)


def test_what_is_missing_or_learnt_twice_is_counted():
    learnt = kills.Learnt()
    for seq in (0, 2, 2, 3):
        learnt.learn("server-0", 7, seq)
    assert learnt.twice == 1
    assert kills._missing(learnt, {"server-0": {7: 6}, "server-1": {1: 1}}) == [
        *("server-0/7/1", "server-0/7/4", "server-0/7/5"),
        "server-1/1/0",
    ]
