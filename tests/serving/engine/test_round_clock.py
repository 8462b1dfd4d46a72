"""Times of rounds beside prompt chunks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from serving.engine.cuda_graphs import Graphs, Landing
from serving.engine.in_flight import RoundClock


@dataclass
class DeviceEvent:
    """An event of a device whose clock the test sets: one of CUDA's, for machines without."""

    at_ms: float
    was_waited_for: bool = False

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.was_waited_for = True

    def elapsed_time(self, end: DeviceEvent) -> float:
        return end.at_ms - self.at_ms


def landing(at_ms: float) -> Landing:
    event: Any = DeviceEvent(at_ms)
    return Landing(event)


def test_a_round_is_timed_from_the_end_of_the_chunks_before_it_however_late_it_is_read():
    clock, device_ms, found = RoundClock(), 0.0, []
    clock.lap(landing(device_ms), time.perf_counter())
    clock.round_was_committed()
    for _ in range(20):  # each pass launches a chunk of 5 ms behind the round under way
        started_s = time.perf_counter()
        device_ms += 1.5
        clock.chunks_were_launched()
        time.sleep(0.01)  # beginning requests takes the host longer than the device
        seconds, _ = clock.lap(landing(device_ms), started_s)
        found.append((seconds, clock.is_timed))
        clock.round_was_committed()
        device_ms += 5.0
        clock.chunks_were_read(landing(device_ms), host_waited=False, is_exact=False)

    assert [seconds for seconds, _ in found] == pytest.approx([0.0015] * 20)
    # The first one ran before the first chunk; of those behind one, every ninth has to do.
    assert [at for at, (_, is_timed) in enumerate(found) if is_timed] == [0, 9, 18]


def test_a_device_that_had_nothing_to_do_does_not_make_a_round_long():
    clock = RoundClock()
    clock.lap(landing(0.0), time.perf_counter())
    started_s = time.perf_counter()
    time.sleep(0.002)

    seconds, _ = clock.lap(landing(60_000.0), started_s)

    assert 0.002 <= seconds < 1.0


def test_without_a_clock_of_the_device_rounds_beside_chunks_tell_seldom():
    clock = RoundClock()
    timed = []
    for _ in range(20):
        clock.chunks_were_launched()
        timed.append(clock.is_timed)
        clock.lap(Landing(None), time.perf_counter())
        clock.round_was_committed()
        clock.chunks_were_read(Landing(None), host_waited=False, is_exact=False)

    assert timed[0] is False
    assert sum(timed) == 0, "behind a chunk whose end nobody knows, no round is timed"


@pytest.mark.gpu
def test_the_clock_of_a_gpu_leaves_out_what_ran_before():
    graphs = Graphs(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")

    def work(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    clock = RoundClock()
    work(20)  # warm
    clock.lap(graphs.mark(), time.perf_counter())
    started_s = time.perf_counter()
    work(200)
    done = graphs.mark()
    work(20)
    landed = graphs.mark()
    clock.chunks_were_read(done, host_waited=False, is_exact=False)
    seconds, host_waited = clock.lap(landed, started_s)

    whole_s = time.perf_counter() - started_s
    assert host_waited
    assert 0 < seconds < whole_s / 5
