"""What an operator reads on stderr: the start, swaps, and a line of figures while there is traffic.

Each server is a real process; its log is its stderr.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.serving.http.live import LiveServer, running_server, wait_for
from tests.serving.http.test_admin import ASK, order, publish_copy

FIGURES = re.compile(
    r"Avg prompt throughput: [\d.]+ tokens/s, "
    r"Avg generation throughput: (?P<speed>[\d.]+) tokens/s, "
    r"Running: \d+ reqs, Waiting: \d+ reqs, KV cache usage: [\d.]+%, "
    r"Prefix cache hit rate: (None|[\d.]+%), Tokens per step: (None|[\d.]+), "
    r"Acceptance rate: (None|[\d.]+%), Drafter version: 0"
)


def damage(server: LiveServer, version: int) -> None:
    """Publish a version of which the server cannot read the tensors."""
    publish_copy(server, version)
    file = server.run_dir / "weights" / str(version) / "drafter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def test_a_server_tells_its_start_its_figures_and_what_becomes_of_versions(
    tiny_target_dir: Path, tmp_path: Path
):
    quick = ("server.log_stats_s=0.2", "swap.enabled=false")
    with running_server(tiny_target_dir, tmp_path, *quick) as server, server.client() as client:
        started = server.log
        client.post("/v1/completions", json={**ASK, "max_tokens": 64})
        wait_for(lambda: FIGURES.search(server.log), 10)
        server.wait_until_idle()
        time.sleep(0.5)
        num_lines = len(FIGURES.findall(server.log))
        time.sleep(0.8)
        assert len(FIGURES.findall(server.log)) == num_lines, "an idle server logs no figures"

        publish_copy(server, 1)
        order(client, "swap", {"version": 1})
        order(client, "rollback")
        damage(server, 2)
        refused = order(client, "swap", {"version": 2})
        assert server.stop() == 0
        log = server.log

    assert f"INFO serving.cli: starting: target {tiny_target_dir}, run_dir" in started
    assert re.search(r"INFO configs\.phases: loaded the target in [\d.]+ s", started)
    assert re.search(r"INFO configs\.phases: found step times in [\d.]+ s", started)
    assert f"INFO serving.http: ready: serving tiny at {server.url}\n" in started
    assert any(float(match["speed"]) > 0 for match in FIGURES.finditer(log))
    assert "INFO serving.swap.in_force: swapped to version 1" in log
    assert "WARNING serving.swap.in_force: rolled back from version 1 to 0" in log
    assert refused.status_code == 409
    assert re.search(r"WARNING serving\.swap\.swapper: .*2.* is damaged", log)
    assert log.rstrip().endswith("INFO serving.cli: stopped")


def test_the_level_error_leaves_a_quiet_log(tiny_target_dir: Path, tmp_path: Path):
    with running_server(tiny_target_dir, tmp_path, "log_level=error") as server:
        assert server.stop() == 0
        assert not re.search(r"INFO|WARNING", server.log)
