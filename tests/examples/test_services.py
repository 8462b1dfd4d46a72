"""A service that the demo starts holds traces and weights, and ends with it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from buffer.backends import open_backend
from buffer.interface import ServiceAwayError, TraceLimits
from examples.services import BUFFER, SERVICES, buffer_url

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


def test_the_log_needs_no_service(tmp_path: Path):
    with buffer_url("log", tmp_path) as url:
        assert url == "log:"
    assert list(tmp_path.iterdir()) == []
