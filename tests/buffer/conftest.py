"""Small sound traces, and processes to kill."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from buffer.interface import TraceLimits
from buffer.records import FeatureRows, Round, Rounds, Sampling, Trace

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def make_trace():
    """Make a sound trace; keywords replace fields."""

    def make(**fields):
        trace = Trace(
            producer="server-1",
            epoch=1_700_000_000_000,
            seq=0,
            request_id="cmpl-1",
            tenant="acme",
            target_fingerprint="ab" * 32,
            sampling=Sampling(
                {"temperature": 1.0, "top_p": 0.9, "top_k": None, "min_p": 0.0, "seed": 7}
            ),
            prompt_length=2,
            token_ids=np.array([5, 6, 7, 8, 9], np.int32),
            rounds=Rounds.of(
                [
                    Round(1, "eagle3", 3, (7, 8), (-1, -0.5), (-2, -0.25), 2, 9, 2, 0.98, 4, 0.004),
                    Round(4, "none", 3, (), None, (), 0, 1, 0, 0.02, 4, 0.003),
                ]
            ),
            features=FeatureRows(
                positions=np.array([0, 1, 3], np.int32),
                layer_ids=(2, 4, 6),
                dtype="bfloat16",
                rows=np.arange(3 * 4 * 8, dtype=np.uint16).reshape(3, 4, 8),
                scale=None,
            ),
            finished_unix_ms=1_700_000_001_000,
        )
        return dataclasses.replace(trace, **fields)

    return make


@pytest.fixture
def limits():
    """Small segments, and acknowledgement at the next ``tend``."""
    return TraceLimits(segment_bytes=4096, max_bytes=1 << 20, ttl_s=3600.0, sync_interval_s=0.0)


@pytest.fixture
def start_python():
    """Start a Python process that sees the rooms; killed at the end if it still runs."""
    started = []

    def start(code, *arguments, **options):
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in filter(None, (process.stdin, process.stdout)):
            stream.close()


@pytest.fixture
def memory(tmp_path):
    """A folder in the place of ``/dev/shm``."""
    folder = tmp_path / "shm"
    folder.mkdir()
    return folder


@pytest.fixture
def root(tmp_path):
    """Of a weights store."""
    return tmp_path / "weights"
