"""What the figures of cells are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.demos import FROM_FIRST
from benchmarks.real.cells import busy_clients
from buffer.records import Acceptance
from configs.load import load_settings
from examples.arms import Arm
from examples.recording import Replay
from oracles.support import REPOSITORY


def replay(arm: Arm, request_s: float, share_s: float) -> Replay:
    return Replay("c", arm, 0, request_s, share_s, (1, 2), Acceptance(), 0, 0)


def test_clients_are_busy_as_long_as_they_wait() -> None:
    """Two clients, three requests: one client has nothing to ask for the last second."""
    plain = [replay("plain", seconds, 4 / 3) for seconds in (2.0, 3.0, 2.0)]
    static = [replay("static", seconds, 1.0) for seconds in (1.0, 1.0)]

    found = busy_clients([*plain, *static])

    assert found["plain"] == pytest.approx(7 / 4) and found["static"] == pytest.approx(1)
    assert found["tuned"] is None


def test_a_server_that_is_compared_makes_all_programs_before_it_is_ready() -> None:
    configs = [Path(REPOSITORY, "configs", "one_gpu.yaml")]
    chosen = ["target=org/name", FROM_FIRST]

    assert load_settings(configs, [], {}).engine.draft_at_start == 2
    assert load_settings(configs, chosen, {}).engine.draft_at_start is None
