"""kill -9 of a serving process: what it acknowledged is in the log, and it starts again."""

from __future__ import annotations

import random
import threading
import time

import httpx
import pytest

from buffer.backends import open_backend
from buffer.segment_report import check_segments
from buffer.traces import TraceReader
from tests.serving.http.live import MODEL, running_server, wait_for


def send_until_dead(url, stop):
    """One client that asks for short completions until the server is gone."""
    body = {"model": MODEL, "prompt": "for item in", "max_tokens": 12, "temperature": 0}
    while not stop.is_set():
        try:
            httpx.post(f"{url}/v1/completions", json=body, timeout=10)
        except httpx.HTTPError:
            return


@pytest.mark.parametrize("seed", range(2))
def test_no_acknowledged_trace_is_lost_and_a_new_server_serves(tiny_target_dir, tmp_path, seed):
    stop = threading.Event()
    fast = ("buffer.sync_interval_s=0.01", "policy.kind=fixed")
    with running_server(tiny_target_dir, tmp_path, *fast) as server:
        clients = [
            threading.Thread(target=send_until_dead, args=(server.url, stop)) for _ in range(3)
        ]
        for client in clients:
            client.start()
        wait_for(lambda: server.metric("traces_total", result="written") >= 5, 30)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        acknowledged = server.metric("traces_total", result="written")
        server.process.kill()
        server.process.wait()
        stop.set()
        for client in clients:
            client.join()

    reports = check_segments(server.run_dir / "traces")
    assert sum(r.records for r in reports) >= acknowledged
    assert sum(r.damaged for r in reports) == 0
    reader = TraceReader(open_backend("log:", server.run_dir))
    traces = reader.read(100_000)
    assert len(traces) >= acknowledged
    assert len({(t.producer, t.epoch, t.seq) for t in traces}) == len(traces)

    (server.run_dir / "server.json").unlink()  # or the fixture would read where the dead one was
    with running_server(tiny_target_dir, tmp_path, *fast) as again:
        answer = httpx.post(
            f"{again.url}/v1/completions",
            json={"model": MODEL, "prompt": "for item in", "max_tokens": 4},
            timeout=20,
        )
        assert answer.status_code == 200
