"""Times work on a GPU under a server's conditions: in a CUDA graph, with a cold cache.

A captured function is replayed with kernels that overwrite the L2 cache between its calls; a graph
of those kernels alone is replayed in turn and subtracted. Each replay waits on the device behind
others until the host has launched it, so launches, which cost a host some 70 microseconds each
where these figures were made and more for a large graph, are no part of a figure.

A figure has in it, besides its kernels: the pause before each of them, about a microsecond where
one waits for the one before, so a function of one kernel that does nothing is not 0; and bringing
back the part of the old cache that was not in memory yet, which the next overwriting is then spared
and so the subtraction takes out. Of a kernel of few microseconds, hold the figure against that of
an empty one.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20  # several times an H200's L2 of 60 MB
_WARM_UPS = 3
_RUNWAY_FLUSHES = 16  # about a millisecond; an H200 takes 65 microseconds for each
_MAX_RUNWAYS = 16


@dataclass(frozen=True, slots=True)
class Timed:
    """Milliseconds of one call."""

    median_ms: float
    low_ms: float
    """A tenth of the repeats were faster."""
    high_ms: float
    """A tenth of the repeats were slower."""


def _device_ms(launch: Callable[[], object]) -> float:
    """Time between two events around ``launch``, all queued before the device comes to them."""
    runway = _flushes(_RUNWAY_FLUSHES)
    num_runways = 1
    while True:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(num_runways):
            runway.replay()
        begin.record()
        launch()
        end.record()
        is_late = begin.query()
        end.synchronize()
        if not is_late:
            break
        if num_runways == _MAX_RUNWAYS:
            warnings.warn(
                f"the host was still launching when the device had done some {num_runways} ms of "
                "other work: the time has a part of the launch in it; time less work at once",
                stacklevel=2,
            )
            break
        num_runways *= 2
    return begin.elapsed_time(end)


def _captured(work: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):  # compiles, tunes and allocates outside the capture
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    graph.replay()
    torch.cuda.synchronize()
    return graph


@functools.cache
def _flushes(calls: int) -> torch.cuda.CUDAGraph:
    return _captured(_flusher(), calls)


@functools.cache
def _flusher() -> Callable[[], object]:
    """One buffer for all: what was captured keeps its address."""
    return torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_


def graphed(work: Callable[[], object], repeats: int = 20, calls: int = 5) -> Timed:
    """Time of one call of ``work``, which must be capturable and write to fixed memory.

    Args:
        repeats: replays of the graph.
        calls: calls in one graph, each before a flush and behind one.
    """
    flush = _flusher()

    # The flush comes last and one comes before the graph: so each replay leaves the cache as it
    # found it, and the memory that is written for the flushes is that of the flushes alone.
    def both() -> None:
        work()
        flush()

    graph, flushes = _captured(both, calls), _flushes(calls)
    with_work, without = [], []
    for _ in range(repeats):  # in turn: clocks drift
        with_work.append(_device_ms(graph.replay))
        without.append(_device_ms(flushes.replay))
    base = statistics.median(without)
    return _summary([(t - base) / calls for t in with_work])


def replayed(launch: Callable[[], object], repeats: int = 20) -> Timed:
    """Time of a graph that is there already, behind kernels that overwrite the cache."""
    for _ in range(_WARM_UPS):
        launch()
    return _summary([_device_ms(launch) for _ in range(repeats)])


def eager(work: Callable[[], object], repeats: int = 20) -> Timed:
    """Time of one call that cannot be captured, between two events, with a cold cache.

    Launches that the device waits for are part of it, the first one among them.
    """
    flush = _flusher()
    for _ in range(_WARM_UPS):
        work()
    times = []
    for _ in range(repeats):
        flush()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return _summary(times)


def _summary(times: list[float]) -> Timed:
    tenths = statistics.quantiles(times, n=10)
    return Timed(statistics.median(times), tenths[0], tenths[-1])


def copy_bytes_per_s(num_bytes: int = 4 << 30, repeats: int = 20, copies: int = 5) -> float:
    """Bytes read plus written each second by a large device-to-device copy: the memory ceiling.

    Copies follow each other in a stream, each many times the L2 cache. One copy in a graph, where
    it is no kernel but a node of its own kind, its launch in the time, had come out at 2.75 TB/s on
    an H200 that copies 4.24 TB/s.
    """
    source = torch.randint(2**62, (num_bytes // 16,), device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    for _ in range(repeats):  # so that the clocks have risen
        copy()
    median_ms = statistics.median(_device_ms(copy) for _ in range(repeats))
    return num_bytes * copies / (median_ms / 1e3)
